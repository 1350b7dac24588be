"""A trained adapter merged into a quantized checkpoint that needs no adapter."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from families import make_model, save_llama
from helpers import init
from peft import LoraConfig, PeftModel, get_peft_model
from runs import killed_after
from safetensors.torch import load_file
from trainings import effective_weights, train
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from quailora import GPTQ, NF4, Calibration, Int8, Optimal, Output, Quantizer, Resources, Sign, Uniform, merge, rebase
from quailora.adapters.change import TrainedChange
from quailora.bases import StoredBase
from quailora.bases.packed import unpacked
from quailora.calibration.sources import BatchCalibration
from quailora.errors import (
    CalibrationError,
    ConfigurationError,
    DoesNotFitError,
    ModelError,
    OutputExistsError,
    QualityError,
)
from quailora.evaluation.scores import Scores
from quailora.evaluation.texts import EvaluationTexts
from quailora.merging.certificate import FULL, MERGED, ROUNDED, Certificate
from quailora.merging.merge import careful_of, nearest_of
from quailora.merging.scales import ScaleTraining
from quailora.merging.training import MergeTraining
from quailora.methods.block_training import BlockTraining
from quailora.models.layers import all_layers

CALIBRATION = Calibration(samples=8, sequence_length=64)
TEXTS = EvaluationTexts(windows=3, window_length=64)
FAST = {"calibration": CALIBRATION, "texts": EvaluationTexts(windows=0), "training": MergeTraining.none()}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def lora(tmp_path_factory, tokenizer):
    """A model, a start by LoRA, and what training has made of it."""
    place = tmp_path_factory.mktemp("merge")
    model = save_llama(place / "model", tokenizer)
    init(str(model), out=str(place / "start"), rank=8, samples=4, sequence_length=64, solver=Optimal())
    train(place / "start", place / "trained", by=1.0)
    return place


def weights_in(folder):
    base = StoredBase(str(folder))
    return {name: base.weight(name, torch.float32).dequantize() for name in base.layers}


@pytest.mark.parametrize("into", [NF4(), GPTQ(3, group_size=32), Int8()], ids=repr)
def test_the_checkpoint_is_nearer_to_the_trained_model_than_rounding(lora, tmp_path, into):
    training = MergeTraining(BlockTraining(20, 128, 8, 64), ScaleTraining(20, 128, 64))
    result = merge(
        lora / "trained", into, out=tmp_path / "out", calibration=CALIBRATION, texts=TEXTS, training=training
    )
    scores = result.certificate.texts["shipped text"]
    slack = 1e-6 if isinstance(into, Int8) else 0.0  # the same rounding
    assert scores[MERGED].divergence <= scores[ROUNDED].divergence + slack
    assert scores[FULL].divergence > 0
    assert result.bits_per_weight == pytest.approx(
        {"Int8": 8.4, "NF4": 4.1}.get(type(into).__name__, into.__dict__.get("bits", 0) + 0.6), abs=0.15
    )
    if not isinstance(into, GPTQ):  # which needs gptqmodel
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        kind = "Linear4bit" if isinstance(into, NF4) else "Linear8bitLt"
        assert {
            type(layer).__name__
            for layer in (stock.model.layers[0].mlp.up_proj, stock.model.layers[1].self_attn.q_proj)
        } == {kind}
    content = json.loads((tmp_path / "out" / "merge.json").read_text(encoding="utf-8"))
    assert content["certificate"]["texts"]["shipped text"][MERGED]["divergences"] == pytest.approx(
        scores[MERGED].divergences
    )
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"| {MERGED} | {scores[MERGED].divergence:.4f} |" in card
    assert ("Its codes and scales were not trained." in card) == isinstance(into, Int8)  # which has none to train


def test_rounding_is_what_merge_and_unload_does(lora):
    """PEFT adds the adapter to the dequantized weight of bitsandbytes, and rounds the sum."""
    nf4 = BitsAndBytesConfig(**NF4().stock_config())
    base = AutoModelForCausalLM.from_pretrained(lora / "model", quantization_config=nf4, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, str(lora / "trained")).merge_and_unload()
    change = TrainedChange.read(lora / "trained")
    layers = change.layers(all_layers(AutoModelForCausalLM.from_pretrained(lora / "model")))
    from bitsandbytes.functional import dequantize_4bit

    for name, layer in layers.items():
        weight = merged.get_submodule(name).weight
        found = dequantize_4bit(weight.data, weight.quant_state).float()
        quantized = NF4().quantize(layer.weight).dequantize()
        expected = NF4().quantize(change.effective(layer, layers, quantized)).dequantize()
        differing = (found - expected).abs() > 1e-3 * expected.abs().max()
        assert differing.float().mean() < 0.01  # PEFT's sum is rounded in another order, so that a tie falls otherwise


@pytest.mark.parametrize("target", ["trained", "full"])
def test_both_targets_are_approached(lora, tmp_path, target):
    merge(lora / "trained", GPTQ(8, group_size=32), out=tmp_path / "out", target=target, **FAST)
    change = TrainedChange.read(lora / "trained")
    layers = change.layers(all_layers(AutoModelForCausalLM.from_pretrained(lora / "model")))
    found = weights_in(tmp_path / "out")
    for name, layer in layers.items():
        quantized = NF4().quantize(layer.weight).dequantize()
        ends = {"full": layer.weight + change.of(layer, layers), "trained": change.effective(layer, layers, quantized)}
        near, far = ((found[name] - ends[one]).norm() for one in (target, "full" if target == "trained" else "trained"))
        assert near < 0.5 * far


def test_layers_without_an_adapter_and_layers_in_full_precision_keep_what_they_compute_with(lora, tmp_path):
    skipping = {**NF4().stock_config(), "llm_int8_skip_modules": ["down_proj", "lm_head"]}
    base = AutoModelForCausalLM.from_pretrained(lora / "model", quantization_config=BitsAndBytesConfig(**skipping))
    base.save_pretrained(tmp_path / "base")
    plain = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    plain.save_pretrained(tmp_path / "trained")
    merge(
        tmp_path / "trained", GPTQ(8, group_size=32), out=tmp_path / "out", initial="zero",
        model=str(lora / "model"), trained_on=str(tmp_path / "base"), **{**FAST, "texts": TEXTS},
    )  # fmt: skip
    found, stored = weights_in(tmp_path / "out"), StoredBase(str(tmp_path / "base"))
    expected = {name: stored.weight(name, torch.float32).dequantize() for name in stored.layers}
    assert not any("down_proj" in name for name in expected)
    assert any("v_proj" in name for name in expected)
    expected |= effective_weights(plain)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert (found[name] - weight).norm() < 0.02 * weight.norm(), name


def test_fused_experts_are_what_they_were_trained_to_be(tokenizer, tmp_path):
    """They stay in floating point, as in stock packages, also where the base that was trained on has them quantized."""
    make_model("Mixtral").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    targets = {"targets": ["q_proj", "experts"], "save_base": True}
    init(str(tmp_path / "model"), out=str(tmp_path / "start"), rank=4, samples=4, sequence_length=32, **targets)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "start" / "base")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    trained = train(tmp_path / "start", tmp_path / "trained", base)
    training = MergeTraining(BlockTraining(3, 64, 4, 32), ScaleTraining(3, 64, 32))
    options = {**FAST, "texts": TEXTS, "training": training}
    result = merge(tmp_path / "trained", NF4(), out=tmp_path / "out", **options)
    assert result.certificate.divergence < 0.05
    with pytest.raises(ModelError, match=r"24 of 27 layers that are not quantized in Uniform.*experts.* among them"):
        rebase(tmp_path / "trained", out=tmp_path / "moved", base=Uniform(8, group_size=16), calibration=CALIBRATION)
    expected = trained.merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    experts = [name for name in expected if "experts" in name]
    assert experts
    for name in experts:
        assert not torch.equal(found[name], before[name])
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_nothing_is_written_above_the_largest_divergence(lora, tmp_path):
    options = {"calibration": CALIBRATION, "texts": TEXTS, "training": MergeTraining.none()}
    with pytest.raises(
        QualityError, match=r"at most 1e-09 nats a token, got .* on shipped text, so nothing was written"
    ):
        merge(lora / "trained", GPTQ(2, group_size=32), out=tmp_path / "out", max_kl=1e-9, **options)
    assert [path.name for path in tmp_path.iterdir()] in ([], ["out.partial"])  # the state, for another limit
    merge(lora / "trained", GPTQ(2, group_size=32), out=tmp_path / "out", max_kl=1.0, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ConfigurationError, match="Expected windows to measure the divergence on"):
        merge(lora / "trained", NF4(), out=tmp_path / "other", max_kl=1.0, **FAST)


@pytest.mark.parametrize(
    "weight",
    [NF4(), NF4(double_quantization=False), GPTQ(group_size=32), Uniform(3, group_size=16), Uniform(2, None)],
    ids=repr,
)
def test_rescaled_weights_are_their_weights_times_their_factors(weight, generator):
    values = torch.randn(64, 96, generator=generator)
    nearest = nearest_of(weight)
    stored = nearest.quantize(values)
    factors = 1 + 0.1 * torch.rand(stored.scale_count, generator=generator)
    expected = stored.dequantize() * stored.spread(factors)
    size = expected.abs().max().item()
    torch.testing.assert_close(stored.rescaled(factors).dequantize(), expected, rtol=0, atol=0.02 * size)
    if stored.packed():
        torch.testing.assert_close(unpacked(stored.packed(), torch.float32).dequantize(), stored.dequantize())


@pytest.mark.parametrize("into", [Sign(32), NF4(block_size=128)], ids=repr)
def test_a_format_without_checkpoints_is_refused(into, lora, tmp_path):
    """The model would take as many bytes as in full precision, whatever bits are said of it."""
    with pytest.raises(ConfigurationError, match="Expected a format that checkpoints hold"):
        merge(lora / "trained", into=into, out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_scales_that_cannot_change_say_so():
    stored = Int8().quantize(torch.randn(4, 8))
    assert stored.scale_count == 0
    with pytest.raises(ConfigurationError, match="The scales of Int8Weight stay as they are"):
        stored.rescaled(torch.ones(4))


def test_trained_scales_bring_predictions_closer(lora, tmp_path):
    """On the text of the training they are never worse, and the codes stay."""
    results = {}
    for steps in (0, 30):
        training = MergeTraining(BlockTraining(0), ScaleTraining(steps, 128, 64, 5e-3))
        results[steps] = merge(
            lora / "trained", GPTQ(3, group_size=32), out=tmp_path / str(steps), calibration=CALIBRATION, texts=TEXTS,
            training=training,
        )  # fmt: skip
    before, after = (results[steps].certificate.divergence for steps in (0, 30))
    assert after < before
    first, second = (load_file(tmp_path / str(steps) / "model.safetensors") for steps in (0, 30))
    differing = {name for name in first if not torch.equal(first[name], second[name])}
    assert differing
    assert all(name.endswith(".scales") for name in differing)
    for steps, said in (
        (0, "Its codes were not trained. Its scales were not trained together."),
        (30, "Its codes were not trained. Its scales were trained together for 30 steps."),
    ):
        assert said in (tmp_path / str(steps) / "README.md").read_text(encoding="utf-8")


def test_windows_that_do_not_fit_are_refused_before_anything_is_computed(lora, tmp_path, monkeypatch):
    monkeypatch.setattr("quailora.merging.merge.finished_run", None)
    options = {**FAST, "texts": EvaluationTexts(windows=2, window_length=512)}
    with pytest.raises(ModelError, match="at most 256 for this model, got 512"):
        merge(lora / "trained", NF4(), out=tmp_path / "out", **options)


def test_scales_that_could_not_be_trained_are_noted(lora, tmp_path):
    options = {**FAST, "training": MergeTraining(BlockTraining(0), ScaleTraining(2, 64, 32))}
    merge(lora / "trained", NF4(), out=tmp_path / "out", resources=Resources(offload="always"), **options)
    noted = json.loads((tmp_path / "out" / "merge.json").read_text(encoding="utf-8"))["training"]
    assert noted.endswith("Its scales were not trained together, because the weights of the model were on disk.")


def test_a_training_that_does_not_fit_is_told_before_it_begins(lora, tmp_path, monkeypatch, caplog):
    """Under a limit it is refused. Nothing is said of blocks that are not trained."""
    monkeypatch.setattr("quailora.merging.training.TRAINED_BYTES", 10**9)
    limited = {**FAST, "resources": Resources(memory_limit="2GiB")}
    merge(lora / "trained", NF4(), out=tmp_path / "out", **limited)
    blocks = {"training": MergeTraining(BlockTraining(2, 64, 4, 32), ScaleTraining(0))}
    with pytest.raises(
        DoesNotFitError, match=r"about .* of memory, and 2\.00 GiB may be used\. Train no blocks, or leave"
    ):
        merge(lora / "trained", NF4(), out=tmp_path / "other", **{**limited, **blocks})
    assert "Train no blocks" not in caplog.text
    merge(lora / "trained", NF4(), out=tmp_path / "other", **{**FAST, **blocks})
    assert "Train no blocks, or leave" in caplog.text


def test_blocks_are_trained_alike_with_their_hidden_states_on_disk(lora, tmp_path):
    for offload in ("never", "always"):
        options = {**FAST, "training": MergeTraining(BlockTraining(4, 64, 4, 32), ScaleTraining(0))}
        merge(lora / "trained", NF4(), out=tmp_path / offload, resources=Resources(offload=offload), **options)
    first, second = (load_file(tmp_path / offload / "model.safetensors") for offload in ("never", "always"))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert {path.name for path in tmp_path.iterdir()} == {"never", "always"}


def test_held_out_windows_are_never_trained_on():
    """However short the text is, so that windows come several times."""
    training = ScaleTraining(5, 64, 32)
    for count in (2, 3, 9, 40):
        rows = torch.arange(count)[:, None].expand(count, 32).contiguous()
        windows, held_out = training.windows(BatchCalibration.of([{"input_ids": rows}]), None)
        assert windows.shape == (10, 32)
        assert 0 < len(held_out) <= min(8, count // 2)
        assert not {row[0] for row in windows.tolist()} & {row[0] for row in held_out.tolist()}
    with pytest.raises(CalibrationError, match="at least two different windows of 32 tokens"):
        training.windows(BatchCalibration.of([{"input_ids": torch.zeros(3, 32, dtype=torch.long)}]), None)


@pytest.mark.parametrize("writes", [22, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 9, 14, 29, 36, 43))])
def test_a_killed_merge_goes_on_to_the_same_bytes(lora, tmp_path, monkeypatch, writes):
    options = {
        "calibration": CALIBRATION,
        "texts": EvaluationTexts(windows=1, window_length=32),
        "training": MergeTraining(BlockTraining(2, 64, 4, 32), ScaleTraining(3, 64, 32)),
    }
    merge(lora / "trained", GPTQ(group_size=32), out=tmp_path / "alone", **options)
    with killed_after(writes, monkeypatch):
        merge(lora / "trained", GPTQ(group_size=32), out=tmp_path / "killed", **options)
    assert not (tmp_path / "killed").exists()
    merge(lora / "trained", GPTQ(group_size=32), out=tmp_path / "killed", **options)
    alone, killed = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("alone", "killed")
    )
    assert alone == killed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "killed"]


@pytest.mark.parametrize("into", [NF4(), pytest.param(GPTQ(group_size=32), marks=pytest.mark.slow)], ids=repr)
def test_a_gpu_makes_the_same_model(lora, tmp_path, on_gpu, into):
    """Nearly all codes are the same, and the certificate, too."""
    options = {
        "calibration": replace(CALIBRATION, dtype="model"),
        "texts": TEXTS,
        "training": MergeTraining(BlockTraining(3, 128, 8, 64), ScaleTraining(3, 128, 64)),
    }
    expected = merge(lora / "trained", into, out=tmp_path / "cpu", resources=Resources(device="cpu"), **options)
    with on_gpu():
        found = merge(lora / "trained", into, out=tmp_path / "gpu", resources=Resources(device="cuda"), **options)
        rebase(lora / "trained", out=tmp_path / "moved", base=into, calibration=options["calibration"])
    assert found.certificate.divergence == pytest.approx(expected.certificate.divergence, rel=0.1)
    ours, theirs = weights_in(tmp_path / "gpu"), weights_in(tmp_path / "cpu")
    for name, weight in theirs.items():
        differing = (ours[name] - weight).abs() > 0.02 * weight.abs().max()
        assert differing.float().mean() < 0.02, name


def test_another_base_than_the_one_that_was_trained_on_is_refused(lora, tmp_path, tokenizer):
    with pytest.raises(ModelError, match="was not made for"):
        merge(lora / "trained", NF4(), out=tmp_path / "out", trained_on=Uniform(2), **FAST)
    other = save_llama(tmp_path / "other", tokenizer, initializer_range=0.3)
    with pytest.raises(ModelError, match="was not made for"):
        merge(lora / "trained", NF4(), out=tmp_path / "out", model=other, **FAST)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_left_alone(lora, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept", encoding="utf-8")
    with pytest.raises(OutputExistsError, match="already holds files"):
        merge(lora / "trained", NF4(), out=Output(tmp_path / "out", overwrite=True), **FAST)


def test_the_command_line_prints_the_certificate(lora, tmp_path, run, monkeypatch):
    monkeypatch.chdir(lora)
    options = ["--samples", "4", "--sequence-length", "64", "--windows", "2", "--window-length", "64"]
    options += ["--block-steps", "2", "--scale-steps", "2"]
    out = tmp_path / "out"
    status, shown, logged = run("merge", "trained", "--into", "gptq", "--into.group-size", "32", "--out", out, *options)
    assert status == 0, logged
    assert MERGED in shown
    assert "2 windows of 64 tokens" in shown
    status, _, logged = run("merge", "trained", "--initial", "zero", "--out", out, *options)
    assert status == 1
    assert "Leave --initial out" in " ".join(logged.split())


def test_a_certificate_takes_the_worst_text():
    scores = [{MERGED: Scores((1.0, 1.0), (kl, kl))} for kl in (0.1, 0.3)]
    certificate = Certificate(dict(zip("ab", scores, strict=True)), {"a": (1.0, 1.0), "b": (1.0, 1.0)}, 8)
    certificate.check(0.3)
    with pytest.raises(QualityError, match=r"got 0\.3000 on b"):
        certificate.check(0.29)


def test_formats_have_their_careful_and_their_nearest_rounding():
    for into in (NF4(), GPTQ(3), Uniform(3), Int8()):
        nearest, careful = nearest_of(into), careful_of(into) or into
        assert isinstance(nearest, Quantizer)
        assert not nearest.needs_calibration
        weight = torch.randn(8, 64)
        from quailora import InputStatistics

        seen = InputStatistics.from_inputs(torch.randn(100, 64))
        assert nearest.quantize(weight).nbytes == careful.quantize(weight, seen).nbytes
