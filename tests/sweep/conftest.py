import pytest
import yaml


@pytest.fixture
def write(tmp_path):
    """Writes a config and a sweep file beside it; returns the latter."""

    def write(grid=None, base=None, name="a", **content):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "base.yaml").write_text(yaml.safe_dump({"seed_everything": 0, **(base or {})}))
        content = {"config": "base.yaml"} | ({"grid": grid} if grid else {}) | content
        (folder / "x.sweep.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return folder / "x.sweep.yaml"

    return write
