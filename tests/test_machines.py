"""Rows of a CPU and of a GPU are kept apart by name and found again by the other machine."""

import pytest

from corey import machines, paths, results

GPU = "NVIDIA H200"


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "LIVE_RESULTS", tmp_path / "live")
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "committed")


def commit(name, device, **parameters):
    results.write_rows([{"latency_us": 2.0, "device": device}], name, parameters=parameters)
    results.publish(name)


def here(device="cpu"):
    table = results.pd.DataFrame({"latency_us": [1.0]})
    return machines.sides(table, "03_try", "latency", {"device": device, "rounds": 5})


def test_a_gpu_has_names_of_its_own():
    assert machines.set_name("03_try", "latency", "cpu") == "03_try_latency"
    assert machines.set_name("03_try", "latency", "cuda:0") == "03_try_gpu_latency"


def test_without_committed_rows_of_a_gpu_this_machine_stands_alone():
    commit("03_try_latency", "cpu", rounds=1)  # its own kind does not count
    (side,) = here()
    assert side.device == results.device_name("cpu") and side.rows.latency_us.tolist() == [1.0]
    assert machines.gpu_side([side]) is None
    assert machines.beside("03_try", "latency", "cpu").startswith("no GPU rows are committed yet")


def test_committed_rows_of_a_gpu_stand_beside_those_of_this_machine():
    commit("03_try_gpu_latency", GPU, rounds=100)
    live, kept = here()
    assert live.parameters["rounds"] == 5
    assert (kept.device, kept.parameters["rounds"], kept.rows.latency_us.tolist()) == (GPU, 100, [2.0])
    assert machines.gpu_side([live, kept]) is kept
    assert machines.beside("03_try", "latency", "cpu") == f"beside this machine: committed rows of {GPU}"


def test_a_gpu_finds_the_committed_rows_of_a_cpu(monkeypatch):
    commit("03_try_latency", "cpu")
    monkeypatch.setattr(results, "device_name", lambda device: GPU)
    live, kept = here("cuda")
    assert live.device == GPU and results.is_cpu(kept.device)
    assert machines.gpu_side([live, kept]) is live
