"""The experiment on what starts are worth after training: its runs, its statistics and its tables."""

from __future__ import annotations

import copy
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from families import save_llama
from filelock import FileLock
from transformers import AutoTokenizer

from experiments.after import After
from experiments.after_scores import STARTS
from experiments.after_tables import draw as draw_after
from experiments.arms import ARMS
from experiments.commands import Experiment, claim
from experiments.cost import costs
from experiments.curvature import top_eigenvalue
from experiments.data import as_held_out, packed, tokens_of
from experiments.draw import filled, in_short, of_families, parts
from experiments.finishing import finished, joined
from experiments.plan import best_rate, outstanding
from experiments.protocol import PROTOCOLS, REFERENCE, SMOKE, Protocol, Run
from experiments.runs import Bench, Store, device_name
from experiments.scoring import held_out_losses, rounds, token_losses
from experiments.statistics import bootstrapped, difference, gap_closed
from experiments.tables import cost_table, gap_of, rate_table, steps_table, steps_to, tasks_table
from experiments.tasks import TASKS, answered, read_items
from experiments.training import base_of, model_of
from experiments.ways import DECAY, SCALED, adapted, balance_by_inputs, optimizer_of, scale_factors, second_moments
from quailora import freeze
from quailora.merging.scales import ScaleTraining
from quailora.merging.training import MergeTraining
from quailora.methods.block_training import BlockTraining
from quailora.training.finish import saved_factors

PAGE = Path(__file__).parents[1] / "docs" / "worth.md"
README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Small stand-ins for the texts of the experiment."""
    folder = tmp_path_factory.mktemp("texts")
    words = ["river", "stone", "light", "under", "water", "green", "field", "small", "house"]
    pairs = [
        {
            "prompt": f"Below is an instruction.\n\n### Instruction:\nSay {words[index % 9]}.\n\n### Response:\n",
            "response": " ".join(words[(index + step) % 9] for step in range(12)),
        }
        for index in range(60)
    ]
    (folder / "dolly_hhrlhf_1000.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    (folder / "wikitext2_raw_test.txt").write_text(" ".join(words * 400), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def ending(tokenizer):
    """A tokenizer that has an end of text."""
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"eos_token": "<end>"})
    return changed


@pytest.fixture(scope="module")
def protocol(tmp_path_factory, ending) -> Protocol:
    model = save_llama(tmp_path_factory.mktemp("model"), ending)
    return replace(SMOKE, name="tiny", model=str(model), length=32, steps=2, calibration_windows=8)


@pytest.fixture(scope="module")
def bench(protocol, texts, tmp_path_factory) -> Bench:
    return Bench(protocol, texts, tmp_path_factory.mktemp("runs"))


def test_a_run_is_kept_and_scored(bench, tmp_path):
    run = Run("best-frozen", 4, 1e-3, curve=True)
    store = Store(bench.protocol, tmp_path)
    store.add(bench.carry_out(run))
    (row,) = store.rows()
    assert store.done() == {run.key}
    assert len(row["after"]["all"]) == len(row["before"]["response"]) == bench.protocol.held_out
    assert len(row["training"]["online"]) == bench.protocol.steps
    assert [step for step, _ in row["training"]["curve"]] == [2]
    assert (bench.folder / "adapters" / run.key / "adapter_model.safetensors").is_file()
    again = bench.carry_out(run)
    assert again["after"] == row["after"], "a run repeats exactly"


def test_the_queue_goes_on_where_it_stopped(protocol, texts, tmp_path, monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "tiny", replace(protocol, rates=(4e-4,)))
    store = Store(protocol, tmp_path)
    runs = outstanding(PROTOCOLS["tiny"], [], device_name())
    done = []
    monkeypatch.setattr(Bench, "carry_out", lambda _, run: done.append(run.key) or stand_in(run))
    for run in runs[:2]:
        store.add(stand_in(run))
    Experiment(texts, "tiny", tmp_path, tmp_path).queue()
    assert done
    assert not {run.key for run in runs[:2]} & set(done)
    assert not outstanding(PROTOCOLS["tiny"], store.rows(), device_name())


def test_no_worker_waits_for_a_start_that_another_makes(protocol, texts, tmp_path, monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "tiny", replace(protocol, rates=(4e-4,)))
    bench, store = Bench(PROTOCOLS["tiny"], texts, tmp_path), Store(protocol, tmp_path)
    bench.starts.mkdir(parents=True)
    by_start = {run.arm: run for run in outstanding(bench.protocol, [], device_name())}
    with FileLock(bench.starts / f"best-train-r{by_start['best'].rank}.lock"):
        assert bench.waits(by_start["best"])
        assert bench.waits(by_start["best-frozen"])
        assert not bench.waits(by_start["qlora"])
        for run in outstanding(bench.protocol, [], device_name()):
            if not bench.waits(run):
                store.add(stand_in(run))
        while not all(map(bench.waits, outstanding(bench.protocol, store.rows(), device_name()))):
            chosen, lock = claim(bench, store)
            store.add(stand_in(chosen))
            lock.release()
        assert claim(bench, store) is None
    chosen, lock = claim(bench, store)
    lock.release()
    assert chosen == by_start["best-frozen"]


def stand_in(run: Run, loss: float = 2.0, device: str = "CPU") -> dict:
    """A result without a run."""
    after = {part: [loss, loss + 1] for part in ("all", "response", "wikitext2")}
    return {"key": run.key, **run.as_dict(), "after": after, "before": None, "device": device}


def test_the_search_goes_beyond_the_edge_of_the_grid():
    rates = REFERENCE.rates
    rows = [stand_in(Run("qlora", 16, rate), 2 - rate) for rate in rates]
    assert best_rate(rows, "qlora", 16) == rates[-1]
    left = outstanding(REFERENCE, rows, "CPU")
    assert Run("qlora", 16, 2 * rates[-1]).key in {run.key for run in left}


def test_the_best_rate_is_that_of_the_mean_over_devices():
    rows = [stand_in(Run("qlora", 16, rate), loss) for rate, loss in ((1e-3, 1.0), (2e-3, 1.1))]
    card = [stand_in(Run("qlora", 16, rate), loss, "card") for rate, loss in ((1e-3, 2.0), (2e-3, 1.5), (4e-3, 1.4))]
    other = [stand_in(Run("qlora", 16, 4e-3, 1), 0.0), stand_in(Run("qlora", 16, 4e-3, 0, "c4"), 0.0)]
    assert best_rate([*rows, *other], "qlora", 16) == 1e-3
    assert best_rate([*rows, *card], "qlora", 16) == 2e-3


def test_runs_are_compared_on_the_same_device():
    """A card on which everything is worse by one nat changes nothing, unless an arm is run there alone."""
    rows = [
        stand_in(Run(arm, 16, 1e-3), loss + offset, device)
        for arm, loss in (("qlora", 3.0), ("int8", 2.0), ("best", 2.5))
        for device, offset in (("CPU", 0.0), ("card", 1.0))
    ]
    alone = stand_in(Run("best", 16, 1e-3, 1), 9.0, "card")
    share = gap_of([*rows, alone], "best", 16)
    assert (share.value, share.low, share.high) == pytest.approx((0.5, 0.5, 0.5))
    assert " -0.5000 ± 0.0000 " in rate_table([*rows, alone], 16).splitlines()[-1]


def test_only_the_fresh_adapter_is_trained_beside_a_held_start(bench):
    start = Run("best-frozen", 4)
    bench.carry_out(start)
    folder = bench.folder / "starts" / "best-train-r4"
    model = model_of(start, ARMS["best-frozen"], folder, bench.protocol)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".default." in name for name in trained)
    alone = model_of(start, ARMS["best"], folder, bench.protocol)
    data = bench.data()
    torch.testing.assert_close(
        token_losses(model, data.wikitext), token_losses(alone, data.wikitext), rtol=0, atol=0.02
    )


def test_two_adapters_train_as_one_with_frozen_directions(bench):
    """What the experiment runs as two stock adapters is what `quailora.freeze` does in one."""
    run = Run("best-frozen", 4)
    bench.carry_out(run)
    start = bench.start(run)
    two = model_of(run, ARMS["best-frozen"], start, bench.protocol)
    two.save_pretrained(bench.folder / "two")
    base = base_of(ARMS["best-frozen"], start, bench.protocol)
    one = joined(base, saved_factors(start), saved_factors(bench.folder / "two")).train()
    freeze(one, 4)
    windows = bench.data().windows[:2]
    losses = [model(input_ids=windows, labels=windows).loss for model in (two, one)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    fresh = dict(two.named_parameters())
    for name, parameter in one.named_parameters():
        if "lora_" in name:
            dimension = 0 if "lora_A" in name else 1
            frozen, trained = parameter.grad.split(4, dimension)
            assert not frozen.any()
            torch.testing.assert_close(trained, fresh[name].grad, rtol=1e-4, atol=1e-6)


def started(bench):
    """A model with a start of which all factors are trained."""
    run = Run("best", 4)
    return model_of(run, ARMS["best"], bench.start(run), bench.protocol)


def test_factors_are_scaled_against_each_other_alone(bench):
    model = started(bench)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    product = (second @ first).detach().clone()
    scale_factors(model, SCALED)
    torch.testing.assert_close(second @ first, product)
    rms = [factor.square().mean().sqrt().item() for factor in (first, second)]
    assert rms[0] / rms[1] == pytest.approx(SCALED, rel=1e-4)
    groups = optimizer_of(model, Run("x", rate=0.8), ARMS["best-slow-a"]).param_groups
    assert [group["lr"] for group in groups] == pytest.approx([0.1, 0.8])


def test_factors_are_balanced_by_their_inputs(bench):
    model = started(bench)
    windows = bench.data().windows[:4]
    products = [(second.weight @ first.weight).detach() for first, second in adapted(model)]
    balance_by_inputs(model, windows)
    moments = second_moments(model, windows)
    for (first, second), product in zip(adapted(model), products, strict=True):
        torch.testing.assert_close(second.weight @ first.weight, product, rtol=1e-3, atol=1e-4)
        gram = second.weight.detach().double().T @ second.weight.detach().double()
        torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-4 * gram.max().item())
        # Inputs behind other layers change a little, as the product is rounded anew.
        torch.testing.assert_close(moments[first], gram, rtol=0, atol=0.02 * gram.max().item())


def test_weights_decay_towards_the_start(bench):
    model = started(bench)
    optimizer = optimizer_of(model, Run("x", rate=0.01), ARMS["best-decay"])
    (first, _), *_ = adapted(model)
    start = first.weight.detach().clone()
    with torch.no_grad():
        first.weight.add_(1.0)
    optimizer.step()  # without gradients
    torch.testing.assert_close(first.weight.detach(), start + 1 - 0.01 * DECAY)


def test_pairs_are_cut_and_scored_by_part(bench, ending):
    pair = {"prompt": "First.\n\nabc def", "response": "ghi " * 40}
    ids, prompt = tokens_of(pair, ending)
    assert ids[-1] == ending.eos_token_id
    held_out = as_held_out(pair, ending, 2 * prompt)
    assert held_out.prompt == prompt
    assert len(held_out.ids) == 2 * prompt
    assert packed(torch.arange(10), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    model = model_of(Run("qlora", 4), ARMS["qlora"], None, bench.protocol)
    pairs = bench.data().held_out
    batched = held_out_losses(model, pairs)
    for index, pair in enumerate(pairs):
        losses = token_losses(model, pair.ids[None])[0]
        assert batched["all"][index] == pytest.approx(losses.mean().item(), abs=0.02)
        assert batched["response"][index] == pytest.approx(losses[pair.prompt - 1 :].mean().item(), abs=0.02)


def test_intervals_are_those_of_pairs_and_seeds():
    generator = np.random.default_rng(0)
    plain = generator.normal(2.7, 0.5, (1, 400))
    better = plain - generator.normal(0.05, 0.2, plain.shape)
    found = bootstrapped(difference, better, plain)
    expected = (better - plain).std() / np.sqrt(400)
    assert found.value == pytest.approx((better - plain).mean())
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * expected, rel=0.1)
    half = bootstrapped(gap_closed, plain, plain - 0.1, plain - 0.05)
    assert (half.value, half.low, half.high) == pytest.approx((0.5, 0.5, 0.5))
    # Two seeds that differ by far more than pairs do.
    seeds = np.stack([plain[0], plain[0] + 1])
    assert bootstrapped(difference, seeds, np.stack([plain[0]] * 2)).high == pytest.approx(1.0)
    with pytest.raises(ValueError, match="same seeds and pairs"):
        bootstrapped(difference, plain, plain[:, :10])


def test_steps_to_a_loss_are_interpolated():
    row = {"before": {"all": [3.0, 5.0]}, "training": {"curve": [[20, 3.0], [40, 2.0]]}}
    assert [steps_to(row, loss) for loss in (4.5, 3.5, 2.25, 1.0)] == [0, 10, 35, None]
    results = [
        {**stand_in(Run(arm, 16, 1e-3, seed)), "before": {"all": [4.0]}, "training": {"curve": curve}}
        for arm, curve in (("qlora", [[20, 3.5], [40, 3.0]]), ("best", [[20, 2.5], [40, 2.0]]))
        for seed in (0, 1)
    ]
    assert steps_table(results, 16, ["best"]).splitlines()[-1] == "| NF4, `best` | 13, 13 | 40 |"


def test_tasks_are_compared_with_qlora_item_by_item():
    def row(arm, trained, right):
        items = {task: {"accuracy": right, "normalized": "0" * len(right)} for task in TASKS}
        return {"arm": arm, "rank": 16, "trained": trained, "items": items}

    rows = [row("qlora", True, "0101"), row("best", True, "1101"), row("best", False, "0000")]
    lines = tasks_table(rows, 16).splitlines()[2:]
    assert lines[0].startswith("| NF4, `best` | before | 0.0% | 0.0% | 0.0% | 0.0% | 0.0% | -50.0% (")
    assert lines[1].startswith("| NF4, `best` | after | 75.0% | 75.0% | 75.0% | 75.0% | 75.0% | +25.0% (")
    assert lines[2] == "| NF4, QLoRA | after | 50.0% | 50.0% | 50.0% | 50.0% | 50.0% |  |"


def test_the_page_has_the_tables_of_the_results():
    """`python -m experiments draw` writes them."""
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page, parts(REFERENCE)) == page
    readme = README.read_text(encoding="utf-8")
    assert filled(readme, in_short(REFERENCE)) == readme
    families = PAGE.with_name("families.md").read_text(encoding="utf-8")
    assert filled(families, of_families(REFERENCE)) == families
    with pytest.raises(ValueError, match="one place for the table 'other'"):
        filled(page, {"other": ""})


def test_figures_in_sentences_are_those_of_the_tables():
    """Shares with their intervals, and differences with theirs, as far as the sentences round them."""
    page = PAGE.read_text(encoding="utf-8")
    tables = " ".join(re.findall(r"<!-- begin .*?<!-- end", page, re.DOTALL))
    prose = re.sub(r"<!-- begin .*?<!-- end", "", page, flags=re.DOTALL)
    shares = {tuple(map(int, found)) for found in re.findall(r"(-?\d+)% \((-?\d+)% to (-?\d+)%\)", tables)}
    told = [tuple(map(int, found)) for found in re.findall(r"(-?\d+) % \((-?\d+) to\s(-?\d+)\)", prose)]
    assert len(told) >= 4
    assert [share for share in told if share not in shares] == []
    differences = {
        (f"{abs(float(value)):.3f}", f"{float(width):.3f}")
        for value, width in re.findall(r"([-+]\d\.\d{4}) ± (\d\.\d{4})", tables)
    }
    told = re.findall(r"(\d\.\d{3}) ± (\d\.\d{3})", prose)
    assert len(told) >= 3
    assert [pair for pair in told if pair not in differences] == []


@pytest.mark.parametrize("arm", ["qlora", "best", "best-frozen", "best-half", "best-twice"])
def test_trained_adapters_are_fitted_again(bench, arm):
    run = Run(arm, 4, 1e-3)
    before = bench.carry_out(run)
    row = finished(bench, run, "quailora")
    assert row["of"] == run.key
    assert row["arm"] == f"{arm}-finished-quailora"
    for part, losses in row["after"].items():
        assert losses != before["after"][part]
        np.testing.assert_allclose(losses, before["after"][part], atol=0.2)


def test_recalibration_is_an_arm(bench):
    longer = Bench(replace(bench.protocol, steps=6), bench.texts, bench.folder.parent)
    row = longer.carry_out(Run("best-recalibrated", 4, 1e-3))
    assert len(row["training"]["online"]) == 6


@pytest.mark.parametrize("arm", ["qlora", "best-frozen"])
def test_a_trained_model_is_loaded_as_it_was(bench, arm):
    run = Run(arm, 4, 1e-3)
    row = bench.carry_out(run)
    assert bench.score(bench.trained_model(run)) == row["after"]


def test_tasks_are_answered_before_and_after(shared_data, bench, tmp_path):
    for name in (*TASKS, "dolly_hhrlhf_1000", "wikitext2_raw_test"):
        source = (shared_data if name in TASKS else bench.texts) / f"{name}.{'txt' if 'wiki' in name else 'jsonl'}"
        shutil.copy(source, tmp_path)
    other = Bench(bench.protocol, tmp_path, bench.folder.parent)
    run = Run("qlora", 4, 1e-3)
    other.carry_out(run)
    rows = [other.answer(run, trained=trained, limit=5) for trained in (False, True)]
    assert rows[0]["key"] != rows[1]["key"]
    for row in rows:
        for right in row["items"].values():
            assert {len(items) for items in right.values()} == {5}
            assert set("".join(right.values())) <= {"0", "1"}


def test_starts_of_more_and_more_tokens(protocol, texts, tmp_path, monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "tiny", protocol)
    for _ in range(2):  # what is there is not measured again
        Experiment(texts, "tiny", tmp_path, tmp_path).tokens(["best"], windows=[4, 8], rank=4)
    rows = Store(protocol, tmp_path, "tokens").rows()
    assert [row["tokens"] for row in rows] == [128, 256]
    assert rows[0]["before"] != rows[1]["before"]


def test_a_start_costs_no_more_than_plain_lora(bench):
    """The same bytes with a start, and those of the activations of more directions beside a frozen one."""
    plain, start, frozen = costs(bench, 4, 2)
    assert [row["arm"] for row in (plain, start, frozen)] == ["qlora", "best", "best-frozen"]
    assert start["state"] == frozen["state"] == plain["state"]
    assert start["saved"] == plain["saved"] <= frozen["saved"]
    # Of frozen factors autograd saves what is not there already: the copies in bfloat16.
    assert (plain["saved"] < frozen["saved"]) == rounds(torch.device("cpu"))
    assert plain["frozen"] == start["frozen"] == 0
    assert frozen["frozen"] == pytest.approx(plain["state"] / 4, rel=0.01)
    assert plain["ratio"] == 1
    table = cost_table([{**row, "device": "CPU"} for row in (plain, start, frozen)])
    assert table.splitlines()[-1].startswith("| NF4, `best`, start frozen | CPU | ")


def test_curvature_is_that_of_the_whole_hessian(bench):
    """Against all eigenvalues, in a tiny model whose Hessian can be written out."""
    run = Run("full", 1)
    model = model_of(run, replace(ARMS["full"]), None, bench.protocol)
    model.get_base_model().set_attn_implementation("eager")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.0.self_attn" in name and "lora" in name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    windows = bench.data().windows[:2]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(model(input_ids=windows, labels=windows).loss, parameters, create_graph=True)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in flat]
    hessian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]).double()
    expected = torch.linalg.eigvalsh((hessian + hessian.T) / 2)[-1].item()
    assert top_eigenvalue(model, windows) == pytest.approx(expected, rel=0.03)


@pytest.mark.slow
def test_the_experiment_from_nothing(shared_data, tmp_path, all_threads):
    """A smoke size of the main arms on the real model; `make test-slow`."""
    bench, store = Bench(SMOKE, shared_data, tmp_path), Store(SMOKE, tmp_path)
    for arm in ("int8", "qlora", "best", "best-frozen"):
        store.add(bench.carry_out(Run(arm, 4, 4e-4)))
    loss = {row["arm"]: np.mean(row["after"]["all"]) for row in store.rows()}
    assert loss["int8"] < loss["best"] < loss["qlora"]
    assert loss["best-frozen"] < loss["qlora"]


def test_answers_are_those_of_the_harness(shared_data, bench, tmp_path):
    """The same items are right, by likelihood and by likelihood per character."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    for task in TASKS:
        lines = (shared_data / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()[:12]
        (tmp_path / f"{task}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        text = "{{query.strip()}}" if task == "copa" else "{{query.strip()}}\nAnswer:"
        content = {
            "task": f"own_{task}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / f"{task}.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": text,
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
        (tmp_path / f"{task}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    model = model_of(Run("full", 4), ARMS["full"], None, bench.protocol).get_base_model().eval()
    tokenizer = AutoTokenizer.from_pretrained(bench.protocol.model)
    results = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=[f"own_{task}" for task in TASKS],
        task_manager=TaskManager(include_path=str(tmp_path)),
        bootstrap_iters=0,
        log_samples=True,
    )
    for task in TASKS:
        samples = sorted(results["samples"][f"own_{task}"], key=lambda sample: sample["doc_id"])
        found = answered(model, tokenizer, read_items(tmp_path / f"{task}.jsonl"), exact=True)
        assert found.accuracy == [bool(sample["acc"]) for sample in samples]
        assert found.normalized == [bool(sample["acc_norm"]) for sample in samples]


def test_trained_adapters_are_merged_and_moved(protocol, texts, tmp_path, monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "tiny", protocol)
    few = MergeTraining(BlockTraining(2, 64, 4, 32), ScaleTraining(2, 64, 32))
    monkeypatch.setattr("experiments.after.MergeTraining", lambda: few)
    Bench(protocol, texts, tmp_path).carry_out(Run("qlora", 16, STARTS["qlora"], 0))
    wanted = ["reference/qlora/0", "merge/qlora/0/nf4/trained", "start/int8", "rebase/qlora/0/int8/16"]
    monkeypatch.setattr("experiments.after.jobs", lambda: [*wanted, "reference/qlora/1"])  # which is not trained
    After(texts, tmp_path, tmp_path, "cpu", "tiny").run()
    rows = {row["key"]: row for row in Store(protocol, tmp_path, "after").rows()}
    assert rows.keys() == set(wanted)
    assert len({rows[key]["adapter"] for key in wanted if "qlora" in key}) == 1
    for row in rows.values():
        for variant in row["scores"].values():
            assert [len(variant[name]) for name in ("pairs", "pairs kl")] == [protocol.held_out] * 2
            assert all(kl > -1e-3 for kl in variant["pairs kl"])
    page = empty_page(tmp_path)
    draw_after(list(rows.values()), page)
    assert "| QLoRA | NF4 | `merge` |" in page.read_text()
    assert "| int8 | QLoRA moved, rank 16 |" not in page.read_text()  # rank 32 alone is in the table for QLoRA


TABLES = ("merges", "full", "moves")


def empty_page(folder):
    page = folder / "page.md"
    page.write_text("".join(f"<!-- begin {name} -->\n<!-- end {name} -->\n" for name in TABLES))
    return page


def after_row(key, adapter, **variants):
    """A row of `python -m experiments.after`: mean losses and divergences of each variant, the same on both texts."""
    scores = {
        name: {"pairs": [loss, loss], "wikitext2": [loss, loss], "pairs kl": [kl, kl], "wikitext2 kl": [kl, kl]}
        for name, (loss, kl) in variants.items()
    }
    return {"key": key, "scores": scores, "end": 2, **({"adapter": adapter} if adapter else {})}


def test_shares_of_merges_and_moves_are_those_of_their_rows(tmp_path):
    rows = [
        after_row("reference/best/0", "a", unmerged=(2.0, 0.0), full=(1.9, 0.05), **{"rounded nf4": (2.4, 0.4)}),
        after_row("merge/best/0/nf4/trained", "a", merged=(2.1, 0.1)),
        after_row("start/gptq4/32", "", full=(2.5, 0.0), base=(3.0, 0.2), start=(2.6, 0.1)),
        after_row("rebase/best/0/gptq4/32", "a", rebased=(2.03, 0.1)),
    ]
    page = empty_page(tmp_path)
    draw_after(rows, page)
    lines = page.read_text().splitlines()
    assert any(line.startswith("| `best` | NF4 | `merge` | 0.1000 | 0.25 (0.25 to 0.25) | +0.100") for line in lines)
    moved = next(line for line in lines if "moved, rank 32" in line)
    assert moved.startswith("| gptq4 | `best` moved, rank 32 | 2.600 | 2.030 | 0.95 (0.95 to 0.95)")
    with pytest.raises(ValueError, match="about another adapter than the rows of best/0"):
        draw_after([*rows, after_row("merge/best/0/gptq/trained", "b", merged=(2.1, 0.1))], page)
    with pytest.raises(ValueError, match=r"end with the same token, got \[1, 2\]"):
        draw_after([*rows, {**after_row("merge/best/0/gptq/trained", "a", merged=(2.1, 0.1)), "end": 1}], page)


def test_a_move_that_has_scored_its_own_merge_needs_no_other_row(tmp_path):
    """Its adapter may be of another training than the one that was merged."""
    rows = [
        after_row("reference/best/0", "a", unmerged=(2.0, 0.0), full=(1.7, 0.05), **{"rounded nf4": (2.4, 0.4)}),
        after_row("start/gptq4/32", "", full=(2.5, 0.0), base=(3.0, 0.2), start=(2.6, 0.1)),
        after_row("rebase/best/0/gptq4/32", "b", rebased=(2.03, 0.1), full=(1.9, 0.05)),
        after_row("rebase/best/1/gptq4/32", "c", rebased=(2.03, 0.1), full=(1.9, 0.05)),
    ]
    page = empty_page(tmp_path)
    draw_after(rows, page)
    assert "| gptq4 | `best` moved, rank 32 | 2.600 | 2.030 | 0.95 (0.95 to 0.95) | 2.030 | 2 |" in page.read_text()


def test_the_page_on_what_comes_after_training_has_the_tables_of_its_results(tmp_path):
    """`python -m experiments.after draw` writes them."""
    page = PAGE.with_name("after.md")
    copied = tmp_path / "after.md"
    shutil.copy(page, copied)
    draw_after(Store(REFERENCE, kind="after").rows(), copied)
    assert copied.read_text(encoding="utf-8") == page.read_text(encoding="utf-8")
