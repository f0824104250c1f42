"""What a figure calls a task: its official name, or, for the made rows, the kind of document that stands in for it."""

OFFICIAL = {
    "narrativeqa": "NarrativeQA",
    "qasper": "Qasper",
    "multifieldqa_en": "MultiFieldQA",
    "gov_report": "GovReport",
}
MADE = {
    "narrativeqa": "made story",
    "qasper": "made article",
    "multifieldqa_en": "made form",
    "gov_report": "made report",
}


def task_labels(longbench: str) -> dict[str, str]:
    """{official task: label} for what a notebook's `longbench` parameter names: "made", or a place of real rows."""
    return MADE if longbench == "made" else OFFICIAL
