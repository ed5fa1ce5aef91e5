"""Files that somebody damaged or made up: one line and an exit code, nothing else, whatever they say."""

import json
import random
import shutil

import pytest

from spmconvert.errors import SpmconvertError
from tests.support import QUICK

DEEP = "[" * 100_000
DIGITS = "9" * 5000
# keys of a dense checkpoint's config.json, each with what it cannot be
CONFIGS = [
    *[{"hidden_size": value} for value in ("32", -32, 0, 2**62, None, [32], 1.5)],
    *[{"num_attention_heads": value} for value in (0, -1, "two", 2**40)],
    *[{"num_hidden_layers": value} for value in (10**6, 0, -1, "3", 2**70)],
    *[{"vocab_size": value} for value in (2**62, -1, "96")],
    *[{"architectures": value} for value in ([5], ["AutoModel"], ["pipeline"], "LlamaForCausalLM", {}, [], [["x"]])],
    *[{"model_type": value} for value in (["llama"], 5, "evil", None, {})],
    {"hidden_act": "evil"},
    {"pad_token_id": 5000},
    {"num_key_value_heads": 3},
    {"num_labels": 10**8},
    {"dtype": "float99"},
    {"_attn_implementation": "evil"},
    {"rope_parameters": 5},
    {"rms_norm_eps": None},
    {"id2label": [1]},
    {"quantization_config": 5},
    {"intermediate_size": 2**40},
    {"text_config": {"num_hidden_layers": 10**7}},
]
# keys of a layer map's entry, and of its first term
ENTRIES = [
    *[{"in": value} for value in ("32", 32.0, 2**62, -1, 0, None, True, [32], 10**9)],
    *[{"out": value} for value in ("32", 2**70, -1)],
    *[{"terms": value} for value in ([], 5, [5], {}, [{"kind": ["spm"]}], [{"kind": "evil"}], None)],
    *[{"bias": value} for value in (1, "yes", None)],
    {"dtype": "float99"},
    {"fan_in_fan_out": 0},
    {"more": 1},
]
TERMS = [
    *[{"width": value} for value in (10**9, 2**70, -1, "x", None, True)],
    *[{"stages": value} for value in (10**9, 2**70, -1, "x", None)],
    *[{"block": value} for value in (10**9, 0, "x", None)],
    *[{"variant": value} for value in (5, "evil", None)],
    {"more": 1},
]
WHOLE = [
    "",
    "{",
    "[]",
    "5",
    "null",
    '"x"',
    DEEP,
    '{"a": ' + DIGITS + "}",
    "\x00",
    "\ud800".encode("utf-8", "surrogatepass"),
]


def refused(result):
    """One line on standard error, and no success."""
    code, _, err = result
    assert code not in (0, 1), err
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if "error:" in line]) == 1, err


@pytest.fixture
def dense(checkpoints, tmp_path):
    """A dense checkpoint of its own, and a way to convert it in no time."""
    shutil.copytree(checkpoints["llama"], tmp_path / "m")
    return tmp_path / "m", ["convert", tmp_path / "m", "-o", tmp_path / "o", "--calib", "none", "--stages", "2"]


@pytest.fixture
def spm(converted, tmp_path):
    """A converted checkpoint of its own."""
    shutil.copytree(converted["llama"], tmp_path / "spm")
    return tmp_path / "spm"


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("change", CONFIGS, ids=str)
def test_configs_that_describe_no_model(run, dense, change):
    directory, command = dense
    edit(directory / "config.json", lambda config: config.update(change))
    refused(run(*command))


@pytest.mark.parametrize("content", WHOLE, ids=lambda content: repr(content[:8]))
@pytest.mark.parametrize("name", ["config.json", "modules.json", "model.safetensors.index.json", "README.md"])
def test_files_of_a_dense_checkpoint_that_are_no_json(run, dense, name, content):
    directory, command = dense
    (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if name.endswith("index.json"):
        # a single file would win
        (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    code, _, err = run(*command)
    assert "Traceback" not in err
    # metadata that cannot be read is nobody's, and an empty list has no modules
    assert code == 0 if name == "README.md" or (name, content) == ("modules.json", "[]") else code > 1


@pytest.mark.parametrize("change", ENTRIES, ids=str)
def test_entries_of_a_layer_map(run, spm, change):
    edit(spm / "config.json", lambda config: next(iter(layers_of(config).values())).update(change))
    code, out, err = run("verify", spm)
    assert (code, "Traceback" in err) == (16, False), out


@pytest.mark.parametrize("change", TERMS, ids=str)
def test_terms_of_a_layer_map(run, spm, change):
    edit(spm / "config.json", lambda config: next(iter(layers_of(config).values()))["terms"][0].update(change))
    code, out, err = run("verify", spm)
    assert (code, "Traceback" in err) == (16, False), out


def layers_of(config):
    return config["quantization_config"]["layers"]


@pytest.mark.parametrize("content", WHOLE, ids=lambda content: repr(content[:8]))
@pytest.mark.parametrize("name", ["config.json", "spm.json", "report.json", "checksums.sha256"])
def test_files_of_a_converted_checkpoint(run, spm, name, content):
    (spm / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out, err = run("verify", spm)
    assert (code, "Traceback" in err) == (16, False), out


@pytest.mark.parametrize("file", ["config.json", "spm.json"])
def test_mutated_structures_are_read_or_refused(run, spm, text, tmp_path, file):
    """Values of every kind in the place of others: nothing but the project's own errors."""
    generator, good = random.Random(0), json.loads((spm / file).read_text())
    for _ in range(60):
        content = json.loads(json.dumps(good))
        for _ in range(generator.randint(1, 3)):
            mutate(content, generator)
        (spm / file).write_text(json.dumps(content))
        _, _, err = run("export", spm, "-o", tmp_path / "dense", "--force")
        assert "Traceback" not in err


def mutate(content, generator):
    """Change one value somewhere inside, in place."""
    place = content
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        if not keys:
            return
        key = generator.choice(list(keys))
        if isinstance(place[key], dict | list) and place[key] and generator.random() < 0.8:
            place = place[key]
            continue
        options = [None, 0, -1, 2**40, 1.5, "x", "", [], {}, True, [[]], {"a": 1}]
        if isinstance(place, dict) and generator.random() < 0.2:
            del place[key]
        else:
            place[key] = generator.choice(options)
        return


LINES = ['{"text": 5}', "[]", DEEP, '{"text": ' + DIGITS + "}", '{"text": "\\ud800 abc"}', "{", '{"text": null}']


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[:16])
def test_lines_that_are_no_documents(run, dense, tmp_path, line):
    directory, _ = dense
    (tmp_path / "x.jsonl").write_text(f"{line}\n" * 50)
    refused(run("convert", directory, "-o", tmp_path / "o", "--calib", tmp_path / "x.jsonl", "--stages", "2"))


@pytest.mark.parametrize("content", ["a = " + "[" * 3000, f"seed = {DIGITS}", "\x00", "seed = 1\nseed = 2", "x"])
def test_recipes_that_are_none(run, dense, tmp_path, content):
    (tmp_path / "x.toml").write_text(content)
    refused(run(*dense[1][:-2], "--recipe", tmp_path / "x.toml"))


@pytest.mark.parametrize("value", [f"seed={DIGITS}", "seed=99999999999999999999", "seed=" + "[" * 3000, "=1", "fit=5"])
def test_values_that_are_none(run, dense, value):
    refused(run(*dense[1], "--set", value))


@pytest.mark.parametrize("damage", [lambda content: content[:-100], lambda _: b"", lambda content: content[:8] * 30])
def test_damaged_tokens_are_made_again(run, spm, text, tmp_path, monkeypatch, damage):
    monkeypatch.setenv("SPMCONVERT_CACHE", str(tmp_path / "cache"))
    command = ["finetune", spm, "--data", text, "-o", tmp_path / "t", "--force", "--steps", "2", "--block-size", "16"]
    command += ["--batch-size", "2", "--set", "evaluation_rows=2"]
    assert run(*command)[0] == 0
    first = (tmp_path / "t" / "model.safetensors").read_bytes()
    for file in (tmp_path / "cache" / "tokens").rglob("*.npy"):
        file.write_bytes(damage(file.read_bytes()))
        assert run(*command)[0] == 0
        assert (tmp_path / "t" / "model.safetensors").read_bytes() == first


@pytest.mark.parametrize("content", ["[]", "[5]", "5", "{}", DEEP, "", '[{"terms": 5}]', '{"ranks": [1]}', "[[1, null]]"])
def test_damaged_curves_are_measured_again(run, checkpoints, text, tmp_path, monkeypatch, content):
    monkeypatch.setenv("SPMCONVERT_CACHE", str(tmp_path / "cache"))
    options = [f"--set={key}={value}" for key, value in QUICK.items()]
    command = ["convert", checkpoints["gpt2"], "-o", tmp_path / "o", "--force", "--calib", text, "--keep", "0.5"]
    command += ["--structures", "lowrank,monarch", "--allow-slower", *options]
    assert run(*command)[0] == 0
    first = (tmp_path / "o" / "model.safetensors").read_bytes()
    for file in (tmp_path / "cache").rglob("*.json"):
        file.write_text(content)
    assert run(*command)[0] == 0
    assert (tmp_path / "o" / "model.safetensors").read_bytes() == first


def test_all_errors_have_an_exit_code_of_their_own():
    def below(kind):
        return [kind, *(own for other in kind.__subclasses__() for own in below(other))]

    assert all(kind.exit_code > 1 for kind in below(SpmconvertError)[1:])
