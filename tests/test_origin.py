"""What an adapter says of its base, before and after training, and what `evaluate` and `check` make of it."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from families import save_llama
from helpers import evaluate, init
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quailora import FP4, GPTQ, NF4, Int8, Optimal
from quailora.adapters.convert import convert
from quailora.adapters.provenance import Origin, read_provenance
from quailora.errors import CalibrationError, ConfigurationError, ModelError
from quailora.evaluation.check import check
from quailora.quantizers.identity import BaseIdentity

FAST = {"rank": 4, "samples": 4, "sequence_length": 64, "solver": Optimal()}
SHORT = {"windows": 1, "sequence_length": 64}
MADE = {
    "nf4": {},
    "int8": {"quantizer": Int8()},
    "gptq": {"quantizer": GPTQ(bits=3), "save_base": True},
    "dequantized": {"quantizer": GPTQ(bits=3), "save_base": True, "base_format": "dequantized"},
}


@pytest.fixture(scope="module")
def adapters(tiny_llama, tmp_path_factory):
    """Adapters for several bases, and what stock PEFT saves of each after a change that stands for training."""
    place = tmp_path_factory.mktemp("origin")
    for name, options in MADE.items():
        init(str(tiny_llama), out=place / name, **FAST, **options)
        with warnings.catch_warnings(action="error", category=UserWarning):  # PEFT knows every key
            model = PeftModel.from_pretrained(
                AutoModelForCausalLM.from_pretrained(tiny_llama), str(place / name), is_trainable=True
            )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.01)
        model.save_pretrained(place / f"{name}-trained")
    return place


@pytest.fixture(scope="module")
def other_model(tokenizer, tmp_path_factory):
    """A model of the same shapes with other weights."""
    options = {"intermediate_size": 96, "num_key_value_heads": 2, "tie_word_embeddings": True}
    torch.manual_seed(7)
    folder = save_llama(tmp_path_factory.mktemp("other"), tokenizer, **options)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor.flip(0) for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


def copied(folder, to):
    return shutil.copytree(folder, to)


def change_json(file, **entries):
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | entries), encoding="utf-8")


def test_origin_survives_training(adapters, tiny_llama):
    for name in MADE:
        before, after = (read_provenance(adapters / each) for each in (name, f"{name}-trained"))
        assert not (adapters / f"{name}-trained" / "quailora.json").exists()
        assert after.origin == before.origin
        assert before.origin.model == str(tiny_llama)
        assert before.layers.keys() != after.layers.keys() == set()
    assert len((adapters / "nf4-trained" / "adapter_config.json").read_text(encoding="utf-8")) < 3000


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_a_trained_adapter_is_measured_on_its_own_base(adapters, tiny_llama, name):
    """Perplexities are those of the folder that `init` wrote, whose quantizer is known."""
    first, second = (evaluate(tiny_llama, adapter=adapters / each, **SHORT) for each in (name, f"{name}-trained"))
    assert first.quantizer == second.quantizer == repr(MADE[name].get("quantizer", NF4()))
    assert first.results["quantized"] == second.results["quantized"]
    if name == "nf4":  # the correction of int8 is too small to see
        assert first.results["quantized + adapter"] != second.results["quantized + adapter"]
    assert check(adapters / f"{name}-trained", base=tiny_llama).layers == 14


@pytest.mark.parametrize("name", ["gptq", "dequantized"])
def test_a_base_that_was_written_with_the_adapter(adapters, tiny_llama, name):
    trained, base = adapters / f"{name}-trained", adapters / name / "base"
    with pytest.raises(ModelError, match=r"which only the folder that init wrote describes. Pass that base as `base`"):
        evaluate(tiny_llama, adapter=trained, **SHORT)
    found = evaluate(tiny_llama, adapter=trained, base=base, **SHORT).results
    expected = evaluate(tiny_llama, adapter=adapters / name, **SHORT).results
    assert found["quantized"].perplexity == pytest.approx(expected["quantized"].perplexity)
    assert check(trained, base=base).layers == check(adapters / name, base=base).layers == 14
    with pytest.raises(ModelError, match=r"is not quantized, and the base of this|is not quantized, and the base of"):
        check(trained, base=tiny_llama)


def test_a_folder_that_does_not_tell(adapters, tiny_llama, tmp_path):
    folder = copied(adapters / "int8-trained", tmp_path / "a")
    change_json(folder / "adapter_config.json", auto_mapping=None)
    told = "does not tell which base its adapter is for"
    with pytest.raises(ModelError, match=rf"{told}.*Name the base: pass `quantizer`"):
        evaluate(tiny_llama, adapter=folder, **SHORT)
    with pytest.raises(ModelError, match=told):
        check(folder, base=tiny_llama)
    assert evaluate(tiny_llama, adapter=folder, quantizer=Int8(), **SHORT).quantizer == repr(Int8())
    with pytest.raises(ConfigurationError, match="got both"):
        evaluate(tiny_llama, adapter=folder, quantizer=Int8(), base=tiny_llama, **SHORT)


@pytest.mark.parametrize("trained", ["", "-trained"])
def test_other_bases_are_refused(adapters, tiny_llama, other_model, trained, caplog):
    """Before training layer by layer, after it all layers together."""
    adapter, told = adapters / f"nf4{trained}", r"14 layers.* have other codes or scales"
    for model, options in [
        (tiny_llama, {"quantizer": FP4()}),
        (tiny_llama, {"quantizer": NF4(block_size=128)}),
        (tiny_llama, {"base": adapters / "gptq" / "base"}),
        (other_model, {}),
    ]:
        with pytest.raises(ModelError, match=rf"was not made for .*{told}.*`any_base=True`"):
            evaluate(model, adapter=adapter, **options, **SHORT)
    found = evaluate(tiny_llama, adapter=adapter, quantizer=FP4(), any_base=True, **SHORT)
    assert found.quantizer == repr(FP4())
    assert "was not made for FP4" in caplog.text
    for base in (other_model, adapters / "gptq" / "base"):
        with pytest.raises(ModelError, match=rf"does not belong on .*{told}"):
            check(adapter, base=base)


def test_an_adapter_that_loads_in_part_is_refused(adapters, tiny_llama, tmp_path):
    fewer = copied(adapters / "nf4", tmp_path / "fewer")
    change_json(fewer / "adapter_config.json", target_modules=["q_proj", "k_proj"])
    with pytest.raises(ModelError, match=r"loads only a part of .*: 20 of its 28 tensors are ignored"):
        evaluate(tiny_llama, adapter=fewer, **SHORT)
    missing = copied(adapters / "nf4", tmp_path / "missing")
    tensors = load_file(missing / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "q_proj.lora_B" not in name}
    save_file(kept, missing / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"2 that the configuration asks for are missing, .*layers.0.*q_proj.lora_B"):
        evaluate(tiny_llama, adapter=missing, **SHORT)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[1, 2]", "Expected a JSON object in .*quailora.json, got list"),
        ("{", "Cannot read .*quailora.json: .* copy it again"),
        ("{}", "quailora.json should say what the adapter was made from, but its entry 'version' is missing"),
    ],
)
def test_damaged_sidecars(adapters, tiny_llama, tmp_path, content, told):
    folder = copied(adapters / "nf4", tmp_path / "a")
    (folder / "quailora.json").write_text(content, encoding="utf-8")
    for attempt in (evaluate, check):
        with pytest.raises(ModelError, match=told):
            attempt(*([tiny_llama] if attempt is evaluate else []), **arguments(attempt, folder, tiny_llama))


def arguments(attempt, folder, model):
    return {"adapter": folder, **({} if attempt is evaluate else {"base": model})}


def test_entries_of_other_types(adapters, tiny_llama, tmp_path):
    for number, (entries, told) in enumerate([
        ({"origin": [1]}, "its entry 'version' is missing or of another type"),
        ({"base": [1]}, "should list the layers of the base and the calibration"),
        ({"base": {"model.layers.0.mlp.up_proj": 3}}, "Expected the hashes and the sketch of a quantized base, got 3"),
        ({"calibration": 3}, "should list the layers of the base and the calibration"),
    ]):
        folder = copied(adapters / "nf4", tmp_path / str(number))
        change_json(folder / "quailora.json", **entries)
        with pytest.raises(ModelError, match=told):
            check(folder, base=tiny_llama)
    folder = copied(adapters / "nf4", tmp_path / "copied")
    shutil.copy(adapters / "int8" / "quailora.json", folder)
    with pytest.raises(ModelError, match="belongs to another adapter than"):
        check(folder, base=tiny_llama)
    config = json.loads((adapters / "nf4" / "adapter_config.json").read_text(encoding="utf-8"))
    origin = config["auto_mapping"]["quailora"]
    for number, quantizer in enumerate([
        {},
        {"class_path": [1]},
        {"class_path": "quailora.quantizers.nf4.NF4", "init_args": 1},
    ]):
        folder = copied(adapters / "nf4-trained", tmp_path / f"quantizer-{number}")
        change_json(folder / "adapter_config.json", auto_mapping={"quailora": origin | {"quantizer": quantizer}})
        with pytest.raises(ModelError, match="Expected"):
            evaluate(tiny_llama, adapter=folder, **SHORT)


def test_a_sidecar_cannot_choose_what_is_read(adapters, tiny_llama, tmp_path):
    """The calibration text that it names is read only if the caller names it, too."""
    secret = tmp_path / "secret.txt"
    folder = copied(adapters / "gptq", tmp_path / "a")
    shutil.rmtree(folder / "base")
    sidecar = json.loads((folder / "quailora.json").read_text(encoding="utf-8"))
    text = sidecar["calibration"]["text"] | {"source": str(secret)}
    change_json(folder / "quailora.json", calibration=sidecar["calibration"] | {"text": text})
    with pytest.raises(CalibrationError, match=r"was calibrated on '.*secret.txt'. Pass that text as `calibration`"):
        evaluate(tiny_llama, adapter=folder, **SHORT)
    change_json(folder / "quailora.json", calibration={"text": 3})
    with pytest.raises(ModelError, match=r"The calibration in .* is damaged"):
        evaluate(tiny_llama, adapter=folder, **SHORT)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_a_base_is_the_same_on_any_number_of_threads(threads, generator):
    """The exact hash of a layer of this size may not be: the mean of its scales is a sum in float32."""
    weight = torch.randn(3072, 1024, generator=generator) * torch.rand(3072, 1, generator=generator)
    found = []
    for count in (1, 2, 4):
        threads(count)
        found.append(BaseIdentity.of(NF4().quantize(weight), weight))
    stored = NF4().quantize(weight)
    stored.state.offset = stored.state.offset.nextafter(torch.tensor(1.0))  # what another order of the sum may give
    found.append(BaseIdentity.of(stored, weight))
    assert len({one.exact for one in found}) > 1
    assert all(found[0].is_same(one) for one in found)
    assert not all(found[0].is_same(one, exactly=True) for one in found)
    together = [BaseIdentity.together({"a": one, "b": one}) for one in found]
    assert all(together[0].is_same(one) for one in together)
    for quantizer, other in [
        (NF4(block_size=128), weight),
        (NF4(double_quantization=False), weight),
        (FP4(), weight),
        (NF4(), weight.roll(1, 0)),
        (NF4(), weight * 1.01),
    ]:
        different = BaseIdentity.of(quantizer.quantize(other))
        assert not found[0].is_same(different)
        assert not together[0].is_same(BaseIdentity.together({"a": different, "b": different}))
    scaled = NF4().quantize(weight)
    scaled.state.state2.absmax.mul_(1.02)
    scaled.state.offset.mul_(1.02)
    assert BaseIdentity.of(scaled).codes == found[0].codes
    assert not found[0].is_same(BaseIdentity.of(scaled))


def test_the_distance_is_that_of_the_weights(generator):
    weight = torch.randn(256, 512, generator=generator)
    stored, other = NF4().quantize(weight), FP4().quantize(weight)
    apart = (stored.dequantize() - other.dequantize()).norm() / (weight - stored.dequantize()).norm()
    found = BaseIdentity.of(stored, weight).distance(BaseIdentity.of(other))
    assert apart / 2 < found < 2 * apart


def test_origins_are_read_as_they_were_written(adapters):
    origin = read_provenance(adapters / "nf4").origin
    written = json.loads(json.dumps(origin.as_config()))["auto_mapping"]["quailora"]
    assert Origin.read(written, adapters) == origin
    with pytest.raises(ModelError, match="its entry 'layers' is missing or of another type"):
        Origin.read(written | {"layers": "14"}, adapters)
    assert replace(origin, layers=3) != origin


PATHS = {"nf4": "quailora.quantizers.nf4.NF4", "gptq": "quailora.quantizers.gptq.GPTQ"}


def as_earlier(folder, to, **entries):
    """Copy what `init` wrote, in the form of versions that noted no origin: one hash a layer, and paths of classes."""
    copied(folder, to)
    content = json.loads((to / "quailora.json").read_text(encoding="utf-8"))
    del content["origin"]
    content["base"] = {name: one["exact"] for name, one in content["base"].items()}
    content["quantizer"]["class_path"] = PATHS[content["quantizer"]["class_path"]]
    content["schedule"]["class_path"] = "quailora.schedules.once.Once"
    del content["calibration"]["bos"]
    (to / "quailora.json").write_text(json.dumps(content | entries), encoding="utf-8")
    change_json(to / "adapter_config.json", auto_mapping=None)
    return to


def test_adapters_of_earlier_versions_are_evaluated_checked_and_converted(adapters, tiny_llama, tmp_path):
    nf4 = as_earlier(adapters / "nf4", tmp_path / "nf4")
    origin = read_provenance(nf4).origin
    assert (origin.needs, origin.layers, origin.initial, origin.checkpoint) == ("model", 14, "", None)
    found, expected = (evaluate(tiny_llama, adapter=folder, **SHORT) for folder in (nf4, adapters / "nf4"))
    assert found.results == expected.results
    assert check(nf4, base=tiny_llama).layers == 14
    with pytest.raises(ModelError, match=r"14 of 14 layers .* how much is different cannot be told, since an earlier"):
        check(nf4, base=adapters / "gptq" / "base")
    convert(adapters / "nf4-trained", initial=nf4, out=tmp_path / "converted")
    config = json.loads((tmp_path / "converted" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(tiny_llama)


def test_bases_of_earlier_versions_that_were_written(adapters, tiny_llama, tmp_path, caplog):
    packed = as_earlier(adapters / "gptq", tmp_path / "packed")
    assert read_provenance(packed).origin.needs == "calibration"
    assert check(packed, base=packed / "base").layers == 14
    assert evaluate(tiny_llama, adapter=packed, **SHORT).results["quantized"].tokens == 63
    shutil.rmtree(packed / "base")
    assert evaluate(tiny_llama, adapter=packed, any_base=True, **SHORT).quantizer == repr(GPTQ(bits=3))
    dequantized = as_earlier(adapters / "dequantized", tmp_path / "dequantized")
    told = "noted no more than hashes of codes and scales, which a base in dequantized form does not have"
    with pytest.raises(ModelError, match=told):
        check(dequantized, base=dequantized / "base")
    assert told not in caplog.text
    evaluate(tiny_llama, adapter=dequantized, **SHORT)
    assert told in caplog.text


def test_other_sidecars_of_earlier_versions(adapters, tiny_llama, tmp_path):
    checkpoint = {"class_path": "quailora.bases.prequantized.Prequantized", "init_args": {"base": "owner/base"}}
    existing = read_provenance(as_earlier(adapters / "nf4", tmp_path / "existing", quantizer=checkpoint)).origin
    assert (existing.needs, existing.checkpoint, existing.quantizer) == ("base", "owner/base", {})
    srr = {"class_path": "quailora.schedules.preserve.Preserve", "init_args": {}}
    assert read_provenance(as_earlier(adapters / "nf4", tmp_path / "srr", schedule=srr)).origin.needs == "base"
    oldest = as_earlier(adapters / "nf4", tmp_path / "oldest", base={})
    assert evaluate(tiny_llama, adapter=oldest, **SHORT).quantizer == repr(NF4())
    with pytest.raises(ModelError, match="cannot be told"):
        check(oldest, base=tiny_llama)
    for number, entries in enumerate([{"quantizer": 3}, {"base": {"a": 1}}, {"calibration": None}]):
        folder = as_earlier(adapters / "nf4", tmp_path / str(number), **entries)
        with pytest.raises(ModelError, match=rf"its entry '{next(iter(entries))}' is missing or of another type"):
            read_provenance(folder)
