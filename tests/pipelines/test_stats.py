import json

import pytest

from pipelines import stats
from pipelines.config import Stats
from pixart_data.config import load

pytestmark = pytest.mark.usefixtures("ray_here")


def table(folder, name, *captions):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text(
        "".join(json.dumps({"caption": text, "other": text}) + "\n" for text in captions)
    )
    return str(folder)


def job(tmp_path, *sets):
    given = {"output": str(tmp_path / "report"), "sets": list(sets), "approximate": True}
    return load(Stats, None, [], {**given, "cluster": {"num_workers": 1, "cpus_per_worker": 0.1}})


def test_sets_whose_names_differ_in_signs_alone_are_kept_apart(tmp_path):
    one = table(tmp_path / "one", "part", "a red house")
    two = table(tmp_path / "two", "part", "a dog and a cat", "a tree")
    made = job(tmp_path, {"name": "原文", "path": one}, {"name": "标题", "path": two})
    [(run, account)] = stats.run(made)
    assert len({unit.id for unit in run.units}) == 2
    assert account.rows_in == 3
    figures = stats.read_stats(made)
    assert [figures[name].num_captions for name in ("原文", "标题")] == [1, 2]


def test_captions_that_are_missing_do_not_fail_the_count(tmp_path):
    path = table(tmp_path / "one", "part", *[None] * 150, "a red house")
    made = job(tmp_path, {"name": "one", "path": path})
    [(_, account)] = stats.run(made)
    assert account.line() == "151 in = 1 out + 150 rejected (no_caption 150)"


def test_another_column_redoes_its_set_alone(tmp_path):
    one = table(tmp_path / "one", "part", "a red house")
    two = table(tmp_path / "two", "part", "a dog")
    first, second = {"name": "one", "path": one}, {"name": "two", "path": two}
    stats.run(job(tmp_path, first, second))
    [(run, plan)] = stats.plan(job(tmp_path, first, {**second, "column": "other"}))
    assert plan.line(run).startswith("stats: 2 shards, 1 done, 1 to do (0 new; 1 redone: column changed)")
