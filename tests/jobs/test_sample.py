"""What `pixart sample` leaves in its folder, however far it gets; `tests/e2e` draws with a real model."""

import pytest

from jobs import sample
from pixart_model.config import Sample

image = pytest.importorskip("PIL.Image")


def write(tmp_path, prompts, pictures):
    job = Sample(checkpoint=str(tmp_path / "run"), prompts=prompts, output=str(tmp_path / "out"))
    sample._write(job, tmp_path / "run", prompts, pictures)


def pictures(tmp_path, count, dies_at=None):
    """Pictures that are made when they are asked for, each once the one before is on the disk."""
    for i in range(count):
        if i == dies_at:
            raise KeyboardInterrupt
        assert (tmp_path / "out" / f"{i - 1:04d}.png").is_file() == (i > 0)
        yield image.new("RGB", (4, 4), (i, 0, 0))


def names(tmp_path):
    return sorted(path.name for path in (tmp_path / "out").iterdir())


def test_pictures_are_written_as_they_come_and_those_of_a_killed_run_are_cleared_away(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, ["a", "b", "c"], pictures(tmp_path, 3, dies_at=2))
    assert names(tmp_path) == ["0000.png", "0001.png", "job.toml", "prompts.txt"]
    (tmp_path / "out" / "9999.png").write_text("not ours")
    write(tmp_path, ["d"], pictures(tmp_path, 1))
    assert names(tmp_path) == ["0000.png", "9999.png", "grid.png", "job.toml", "prompts.txt"]
    assert (tmp_path / "out" / "prompts.txt").read_text() == "0000.png d\n"
    assert "all on one sheet in" in capsys.readouterr().out


def test_of_more_than_a_hundred_pictures_there_is_no_sheet_and_it_says_so(tmp_path, capsys):
    for count, has_sheet in ((100, True), (101, False)):
        write(tmp_path, ["x"] * count, pictures(tmp_path, count))
        assert (tmp_path / "out" / "grid.png").exists() == has_sheet, "nor one of an earlier run"
    assert capsys.readouterr().out.splitlines()[1] == (
        f"sample: 101 images -> {tmp_path}/out, more than 100, so there is no sheet of all of them"
    )
