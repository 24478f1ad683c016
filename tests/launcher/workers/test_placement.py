"""The seats of workers from where they sit."""

from __future__ import annotations

import pytest

from training.config import Resources


def place(node: str, cores: int = 8, address: str = "10.0.0.1", gpus: tuple[str, ...] = ()) -> dict:
    return {"node": node, "address": address, "gpus": list(gpus), "cores": cores, "pid": 1}


@pytest.fixture(scope="module")
def workers():
    from launcher.workers import worker_group as workers

    return workers


def test_ranks_are_as_given_and_local_ranks_count_on_each_node(workers):
    places = [place(node, address=f"10.0.0.{node}") for node in "12112"]
    rank_infos = workers.rank_infos_for(places, Resources(), "cpu", "10.0.0.1", 29500)
    assert [rank_info.rank for rank_info in rank_infos] == [0, 1, 2, 3, 4]
    assert [rank_info.local_rank for rank_info in rank_infos] == [0, 0, 1, 2, 1]
    assert [rank_info.local_size for rank_info in rank_infos] == [3, 2, 3, 3, 2]
    assert [rank_info.address for rank_info in rank_infos] == [
        "10.0.0.1",
        "10.0.0.2",
        "10.0.0.1",
        "10.0.0.1",
        "10.0.0.2",
    ]
    assert {(rank_info.size, rank_info.host, rank_info.port, rank_info.device) for rank_info in rank_infos} == {
        (5, "10.0.0.1", 29500, "cpu")
    }


@pytest.mark.parametrize(
    ("cores", "workers_on_node", "setting", "threads"),
    [(8, 2, "auto", 4), (8, 3, "auto", 2), (2, 5, "auto", 1), (8, 2, 7, 7)],
)
def test_threads_are_the_nodes_cores_shared_unless_they_are_set(workers, cores, workers_on_node, setting, threads):
    rank_infos = workers.rank_infos_for(
        [place("a", cores)] * workers_on_node, Resources(threads=setting), "cpu", "h", 1
    )
    assert {rank_info.threads for rank_info in rank_infos} == {threads}


def test_nodes_with_other_numbers_of_cores_share_them_on_their_own(workers):
    rank_infos = workers.rank_infos_for([place("a", 8), place("a", 8), place("b", 2)], Resources(), "cpu", "h", 1)
    assert [rank_info.threads for rank_info in rank_infos] == [4, 4, 2]


def test_a_worker_sees_the_gpus_of_its_nodes_workers_in_order_of_rank(workers):
    places = [place("a", gpus=("3",)), place("b", gpus=("0",)), place("a", gpus=("1",))]
    assert [workers._visible_gpus(places, p["node"]) for p in places] == ["3,1", "0", "3,1"]
