import pytest

from pixart_model.grid import contact_sheet

image = pytest.importorskip("PIL.Image")


@pytest.mark.parametrize(("count", "size"), [(1, (6, 5)), (2, (12, 5)), (3, (12, 10)), (5, (18, 10)), (9, (18, 15))])
def test_a_sheet_holds_every_picture_in_its_cell(count, size):
    pictures = [image.new("RGB", (6, 4) if i % 2 else (3, 5), (i + 1, 0, 0)) for i in range(count)]
    if count == 1:
        pictures = [image.new("RGB", (6, 5), (1, 0, 0))]
    sheet = contact_sheet(pictures)
    assert sheet.size == size
    columns = size[0] // 6
    for i, picture in enumerate(pictures):
        left, top = i % columns * 6, i // columns * 5
        assert sheet.crop((left, top, left + picture.width, top + picture.height)).tobytes() == picture.tobytes()
