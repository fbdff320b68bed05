"""The measurement of what looking at new images costs."""

import json

from app import bench


def test_scan_says_what_it_measured(tmp_path, capsys):
    assert bench.main(["scan", "--images", "3", "--megapixels", "0.5", "--json", str(tmp_path / "x.json")]) == 0
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["images"] == 3 and 0.01 < found["megabytes_each"] < 1
    assert found["new_cpu_ms"] > found["known_content_cpu_ms"] > found["same_file_cpu_ms"] > 0 and found["decoding_alone_cpu_ms"] > 0
    assert "A thousand new ones" in capsys.readouterr().out
