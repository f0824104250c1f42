"""The closed vocabularies of the made tasks. Changing a word changes every sample: retrain corey-mini if you do."""

PEOPLE = "Mara Odin Petra Hugo Selma Tomas Nadia Felix Greta Anton Livia Casper Ruth Emil Vera Janus".split()
PLACES = (
    "mill harbour chapel orchard tower market library stable bakery quarry garden cellar bridge school forge attic"
).split()
PARSERS = "Kestrel Heron Plover Osprey Merlin Harrier Linnet Siskin Dunlin Avocet Curlew Godwit".split()
CORPORA = "Larch Alder Rowan Hazel Cedar Aspen Maple Willow Juniper Walnut Spruce Laurel".split()
SCORES = "41 47 53 56 62 65 68 71 74 79 83 88".split()
FIELDS = {
    "supplier": "Halden Norwick Tarrant Velmer Osgood Brandt Kessel Marlow".split(),
    "colour": "amber crimson indigo ochre scarlet teal violet ivory".split(),
    "city": "Lisbon Bergen Ghent Turin Krakow Malmo Porto Graz".split(),
    "contact": "Ines Bruno Clara Dario Edith Floris Gwen Henrik".split(),
    "material": "copper granite linen walnut glass leather slate brass".split(),
    "carrier": "Arrow Beacon Comet Dolphin Falcon Meteor Pelican Zephyr".split(),
    "season": "spring summer autumn winter harvest monsoon solstice thaw".split(),
    "department": "finance transport archives security forestry fisheries customs housing".split(),
    "currency": "crowns guilders florins ducats shillings pesetas drachmas rupees".split(),
    "instrument": "cello flute harp oboe trumpet violin bassoon lute".split(),
}
TOPICS = (
    "bridges harbours schools railways forests hospitals libraries museums canals airports prisons markets"
).split()
FINDINGS = (
    "costs rose sharply|staff numbers fell|repairs ran late|safety improved|demand doubled|records were lost|"
    "fees stayed flat|visits declined|budgets were cut|delays grew longer|quality held steady|waste was halved"
).split("|")

# Filler sentences of a task: subject, verb, tail.
FILLER = {
    "long_story_qa": (
        "The wind|An old dog|The river|A thin rain|The evening light|A passing cart|The church clock|Someone".split(
            "|"
        ),
        "moved slowly|made no sound|was heard again|came and went|stayed for a while|seemed far away".split("|"),
        (
            "along the valley.|before the night.|beyond the fields.|as in other years.|without any reason.|"
            "near the hedge."
        ).split("|"),
    ),
    "article_qa": (
        (
            "The baseline|Our ablation|The second experiment|A larger beam|The annotation|Error analysis|This setup"
        ).split("|"),
        (
            "follows earlier work|changes little|is described below|agrees with theory|needs more data|"
            "was repeated twice"
        ).split("|"),
        (
            "in most settings.|for short inputs.|under both seeds.|as the appendix shows.|with small variance.|"
            "on every split."
        ).split("|"),
    ),
    "multi_field_qa": (
        ("The form|This page|A clerk|The ledger|Each entry|The second copy|An attached note|The register").split("|"),
        (
            "was checked twice|is kept on file|carries a stamp|replaces the draft|was signed in ink|lists no changes"
        ).split("|"),
        "before noon.|by the office.|as usual.|in this quarter.|without remarks.|for the record.".split("|"),
    ),
    "report_summary": (
        ("The committee|An inspector|The agency|This chapter|The public hearing|A survey|The review board").split("|"),
        ("met several times|collected statements|followed the usual plan|reported no dissent|asked for comment").split(
            "|"
        ),
        (
            "during the year.|in all regions.|under the new act.|before the deadline.|with local offices.|as required."
        ).split("|"),
    ),
}
