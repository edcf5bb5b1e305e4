import pytest

from pipelines import cluster
from pipelines.cluster import Share, share
from pipelines.config import Cluster
from pixart_data.errors import JobError


@pytest.fixture
def nodes(monkeypatch):
    """Pretend that Ray has nodes of (CPUs, GPUs); a dead one is among them."""

    def pretend(*sizes):
        alive = [
            {"Alive": True, "Resources": {"CPU": float(c), "GPU": float(g)} if g else {"CPU": float(c)}}
            for c, g in sizes
        ]
        dead = {"Alive": False, "Resources": {"CPU": 1000.0, "GPU": 1000.0}}
        monkeypatch.setattr(cluster.ray, "nodes", lambda: [*alive, dead])

    return pretend


@pytest.mark.parametrize(
    ("sizes", "settings", "num_units", "per_cpu", "expected"),
    [
        ([(2, 0)], {}, 9, False, Share(1, 2.0, 0.0)),  # a laptop: one worker with everything
        ([(2, 0)], {}, 9, True, Share(2, 1.0, 0.0)),
        ([(16, 8)], {}, 99, False, Share(8, 2.0, 1.0)),
        ([(16, 8), (96, 8)], {}, 99, False, Share(16, 2.0, 1.0)),  # the node with the least decides
        ([(32, 0), (64, 8)], {}, 99, False, Share(8, 8.0, 1.0)),  # CPU nodes hold no GPU worker
        ([(16, 8)], {}, 3, False, Share(3, 2.0, 1.0)),  # never more workers than units
        ([(16, 8)], {}, 99, True, Share(16, 1.0, 0.0)),  # counting nouns needs no GPU
        ([(16, 8)], {"gpus_per_worker": 0.5}, 99, False, Share(16, 1.0, 0.5)),
        ([(1, 0), (1, 0)], {}, 9, False, Share(1, 1.0, 0.0)),  # not the two CPUs of two nodes
        ([(16, 0), (16, 0)], {"num_workers": 4}, 9, False, Share(4, 8.0, 0.0)),
        ([(1, 8)], {}, 99, False, Share(8, 1.0, 1.0)),
    ],
)
def test_workers_get_an_equal_share_of_their_node(nodes, sizes, settings, num_units, per_cpu, expected):
    nodes(*sizes)
    assert share(Cluster(**settings), num_units, per_cpu) == expected


@pytest.mark.parametrize("settings", [{"gpus_per_worker": 2.0}, {"cpus_per_worker": 17.0}])
def test_a_worker_that_fits_no_node_is_refused_instead_of_waited_for(nodes, settings):
    nodes((16, 1), (16, 1))
    with pytest.raises(JobError, match="the largest node has 16 and 1; lower cluster.cpus_per_worker"):
        share(Cluster(**settings), 9)


def test_a_cluster_that_does_not_answer_is_one_line(monkeypatch):
    def init(**options):
        raise ConnectionError("nobody there")

    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", init)
    with pytest.raises(JobError, match="cluster.address: Ray at host:1 does not answer: nobody there"):
        cluster.connect(Cluster(address="host:1"))
