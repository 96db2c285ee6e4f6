import data_loading
from scored import noise, write, write_pairs


def test_the_table_has_a_row_for_every_source_and_names_what_the_model_takes_in(tmp_path):
    write_pairs(tmp_path / "pairs", 8, 40, 48)
    for i in range(13):
        write(tmp_path / "frames" / f"{i:02}.png", noise(40, 48, i))
    data = {"train_data_dir": "frames", "frames_dir": "frames", "train_pairs_dir": "pairs"}
    folders = [part for name, folder in data.items() for part in (f"--{name}", str(tmp_path / folder))]
    options = ["--resolution", "32", "--batch_size", "2", "--seconds", "0.01", "--steps", "1", "--num_workers", "1"]
    assert data_loading.main([*folders, *options, "--output", str(tmp_path / "table.md")]) == 0
    text = (tmp_path / "table.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 6
    assert all(float(cell) > 0 for row in rows for cell in row.split("|")[2:5])
    assert "hidiff-small, stage 2, takes in" in text


def test_made_up_pictures_pack_about_as_well_as_photographs(tmp_path):
    data_loading.made_up(tmp_path / "pictures", 1, 320, 320, ".png")
    (file,) = (tmp_path / "pictures").iterdir()
    assert 0.9 < file.stat().st_size / 320**2 < 1.8  # bytes a pixel; of ten photographs of that size the mean was 1.2
