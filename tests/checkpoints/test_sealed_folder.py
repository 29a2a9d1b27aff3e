"""Checksums of the small files of a workdir: one flipped bit anywhere is named, and what was meant is read."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from moe.checkpoints.workdir import read_config, record_changes, write_run_files
from moe.config import Config, ConfigError, StartConfig, TrainConfig, inherited, to_dict
from moe.config.files import read_run
from moe.data.tokenizer import train_tokenizer
from moe.data.tokenizer_files import companions, find_tokenizer
from moe.interop import export_checkpoint, import_checkpoint
from moe.interop.workdirs import SOURCE_FILE, open_source
from moe.system.sealed_folder import CONFIG, read_checked_object, read_sums
from moe.training.averaging import write_average

OPEN = Path(__file__).parents[1] / "data" / "checkpoints" / "mistral"


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sealed")
    shutil.copytree(OPEN, folder / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "source" / name).unlink(missing_ok=True)
    model = train_tokenizer(["word of a text\n" * 99], 272).model_bytes
    (folder / "source" / "tokenizer.model").write_bytes(model)
    (folder / "source" / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    import_checkpoint(folder / "source", folder / "run")
    write_average(str(folder / "run"), str(folder / "mean"), [], ema=False)
    return folder


def _read_all(workdir):
    """Contents of the small files of a workdir, as programs read them."""
    config = read_config(workdir)
    settings = read_run(str(workdir / CONFIG)), inherited({"start.checkpoint": str(workdir)})
    beside = open_source(workdir, config)[1] if (workdir / SOURCE_FILE).exists() else None
    generation = read_checked_object(workdir / "generation_config.json")
    return repr((config, settings, find_tokenizer(workdir).model_bytes, companions(workdir), beside, generation))


@pytest.mark.parametrize("kind", ["run", "mean"])
def test_a_flipped_bit_of_a_small_file_is_noticed(imported, tmp_path, kind):
    workdir = tmp_path / kind
    shutil.copytree(imported / kind, workdir)
    expected, draw = _read_all(workdir), np.random.default_rng(0)
    names = [path.name for path in workdir.iterdir() if path.is_file()]
    assert {CONFIG, "tokenizer.model", "generation_config.json"} <= {*names}
    for name in names:
        content, refused = (workdir / name).read_bytes(), 0
        for place in draw.integers(0, 8 * len(content), 24):
            flipped = bytearray(content)
            flipped[place // 8] ^= 1 << place % 8
            (workdir / name).write_bytes(flipped)
            try:
                assert _read_all(workdir) == expected, (name, place)  # a changed space
            except ConfigError as error:
                refused += 1
                assert name in str(error) or "start.checkpoint" in str(error), error  # noqa: PT017
        (workdir / name).write_bytes(content)
        assert refused > 5, name


def test_a_missing_file_is_named_in_place_of_a_substitute(imported, tmp_path):
    """Without the import's own config.json an export would have another one's defaults."""
    workdir = tmp_path / "run"
    shutil.copytree(imported / "run", workdir)
    names = read_sums(epath.Path(workdir))
    assert {*names} == {SOURCE_FILE, "tokenizer.model", "generation_config.json"}
    for name in names:
        content = (workdir / name).read_bytes()
        (workdir / name).unlink()
        with pytest.raises(ConfigError, match=rf'/{name}: is missing, though .*restore it.*delete "checksums"'):
            export_checkpoint(workdir, tmp_path / "out")
        if name == "tokenizer.model":
            with pytest.raises(ConfigError, match=r"tokenizer\.model: is missing"):
                find_tokenizer(workdir)
        (workdir / name).write_bytes(content)
    written = json.loads((workdir / CONFIG).read_text())
    del written["checksums"]
    (workdir / CONFIG).write_text(json.dumps(written))
    (workdir / SOURCE_FILE).unlink()
    assert open_source(workdir, read_config(workdir))[:2] == (None, None)


def test_every_bit_of_the_name_of_the_checksums_counts(imported, tmp_path):
    """A config under another name of its checksums is not one of an earlier version, which has none."""
    content = (imported / "run" / CONFIG).read_bytes()
    start = content.index(b'"checksums"')
    for place in range(8 * start, 8 * (start + len(b'"checksums"'))):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        (tmp_path / CONFIG).write_bytes(flipped)
        with pytest.raises(ConfigError, match=r"config\.json"):
            read_config(tmp_path)


def test_a_run_whose_import_is_damaged_is_not_exported_as_one_without(imported, tmp_path):
    """Without the import's own config.json an export would have another one's defaults."""
    source = tmp_path / "import"
    shutil.copytree(imported / "run", source)
    run = dataclasses.replace(read_config(source), start=StartConfig(checkpoint=str(source)))
    assert open_source(tmp_path / "run", run)[0] == epath.Path(source)
    content = (source / CONFIG).read_bytes()
    for damaged in (content[:-9], content.replace(b'"seed": 0', b'"seed": 1')):
        (source / CONFIG).write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"import/config\.json: "):
            open_source(tmp_path / "run", run)
    (source / CONFIG).unlink()  # the import was deleted since
    assert open_source(tmp_path / "run", run)[0] is None


def test_an_export_does_not_copy_a_damaged_tokenizer(imported, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(imported / "run", workdir)
    content = (workdir / "tokenizer.model").read_bytes()
    (workdir / "tokenizer.model").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ConfigError, match=r"tokenizer\.model: differs from what was written"):
        export_checkpoint(workdir, tmp_path / "out")


def test_a_changed_digit_is_named_with_the_remedy(imported, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(imported / "run", workdir)
    written = json.loads((workdir / CONFIG).read_text())
    theta = written["model"]["rope_theta"]
    written["model"]["rope_theta"] = theta * 2
    (workdir / CONFIG).write_text(json.dumps(written))
    for read in (read_config, lambda folder: read_run(str(folder / CONFIG))):
        with pytest.raises(ConfigError, match=r'config\.json.*its checksum does not match; .*delete "checksums"'):
            read(workdir)
    del written["checksums"]
    (workdir / CONFIG).write_text(json.dumps(written))
    assert read_config(workdir).model.rope_theta == theta * 2
    (workdir / "tokenizer.model").write_bytes(train_tokenizer(["other words\n" * 99], 272).model_bytes)
    find_tokenizer(workdir)  # a folder without checksums is read as it is


def test_a_change_keeps_the_sums_of_other_files(tmp_path):
    tokenizer = train_tokenizer(["word of a text\n" * 99], 272).model_bytes
    folder = epath.Path(tmp_path)
    write_run_files(Config(), {"tokenizer.model": tokenizer}, folder, new=True)
    steps = 2 * Config().train.num_steps
    changed = Config(train=TrainConfig(num_steps=steps))
    record_changes(changed, {"train.num_steps": [steps // 2, steps]}, 1, folder)
    assert read_config(tmp_path).train.num_steps == steps
    find_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer[:-1] + bytes([tokenizer[-1] ^ 1]))
    with pytest.raises(ConfigError, match=r"tokenizer\.model.*differs from what was written"):
        find_tokenizer(tmp_path)


def test_a_config_of_an_earlier_version_is_read(tmp_path):
    (tmp_path / CONFIG).write_text(json.dumps(to_dict(Config(seed=5))))
    assert read_config(tmp_path).seed == 5
