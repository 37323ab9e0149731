"""Numerics of a decoder: its largest scores, the precision of attention, and diverged runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import run_tiny

from rudolph.data.splits import Splits
from rudolph.evaluation.context import EvaluationContext
from rudolph.evaluation.report_card import EVALUATORS
from rudolph.families.rudolph import RudolphCapabilities
from rudolph.models.layers.attention import KeyValue, attention
from rudolph.models.rudolph import decoder as layer_module
from rudolph.models.rudolph.decoder import PRECISIONS, DecoderConfig, MaskedDecoder
from rudolph.runs.resolve import load_run
from rudolph.sequence.layout import SequenceLayout, Vocabulary

LAYOUT, VOCABULARY = SequenceLayout(5, 3, 4), Vocabulary(20, 3, 5, 11, 2)
CONFIG = DecoderConfig(2, 24, 3, layer_masks=("causal",), last_layer_mask=None)


def decoder(**changes: Any) -> MaskedDecoder:
    torch.manual_seed(0)
    return MaskedDecoder(replace(CONFIG, **changes), LAYOUT, VOCABULARY).eval()


def test_the_largest_scores_are_those_that_attention_computes(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, config = load_run(finished)
    split = Splits(config.data, finished.parent.parent / ".cache")("test")
    context = EvaluationContext(
        RudolphCapabilities(pipeline), config.sampling.image, config.sampling.text, 4, 0
    )
    seen_scores: list[torch.Tensor] = []

    def recorded(query: torch.Tensor, seen: list[KeyValue], **rest: Any) -> torch.Tensor:
        scores = (query @ seen[0].key.mT / query.shape[-1] ** 0.5).abs()
        causal = torch.ones_like(scores[0], dtype=torch.bool).tril()
        seen_scores.append(scores.masked_fill(~causal, 0).view(4, -1).amax(1))
        return attention(query, seen, **rest)

    monkeypatch.setattr(layer_module, "attention", recorded)
    largest, overflows = EVALUATORS["attention_logits"](context, split)
    assert largest.name == "decoder/max_attention_logit/test" and overflows.value == 0
    expected = torch.stack(seen_scores).amax(0).double().mean()
    assert largest.value == pytest.approx(float(expected), rel=1e-6)
    assert len(seen_scores) == config.decoder.num_layers
    for layer in pipeline.decoder.layers:
        for parameter in layer.to_qkv.parameters():
            parameter.data[: 2 * config.decoder.hidden_size] *= 2000
    assert EVALUATORS["attention_logits"](context, split)[1].value == 1


def test_attention_in_a_precision_is_that_of_values_rounded_to_it() -> None:
    tokens = torch.randint(1, 11, (2, 18), generator=torch.Generator().manual_seed(1))
    plain = decoder()(tokens)
    errors = {
        name: float((decoder(attention_precision=name)(tokens) - plain).abs().max().detach())
        for name in PRECISIONS
    }
    assert errors["float32"] < 1e-5 < errors["float16"] < errors["bfloat16"] < 0.1
    # Inside an autocast region, which would otherwise compute in bfloat16 too.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = [
            decoder(attention_precision=name)(tokens).float() for name in ("float32", "float16")
        ]
    torch.testing.assert_close(*inside, atol=0.05, rtol=0)


def test_float16_loses_large_scores_unless_they_are_relaxed() -> None:
    tokens = torch.randint(1, 11, (2, 18), generator=torch.Generator().manual_seed(1))
    found = {}
    for is_relaxed in (True, False):
        for name in ("float16", "float32"):
            model = decoder(attention_precision=name, pb_relax=is_relaxed)
            for layer in model.layers:
                layer.to_qkv.weight.data[:48] *= 300
            found[is_relaxed, name] = model(tokens)
    assert torch.equal(found[True, "float32"], found[False, "float32"])
    assert torch.isfinite(found[True, "float16"]).all()
    assert not torch.isfinite(found[False, "float16"]).all()


def test_a_run_that_is_lost_is_an_answer_where_survival_is_asked(tmp_path: Path) -> None:
    questions = "evaluation.evaluators=[convergence]", "evaluation.grid_prompts=[]"
    lost = "optim.learning_rate=1e30", "optim.gradient_clip=null"
    for number, (changes, survived) in enumerate(((lost, 0.0), ((), None))):
        folder = tmp_path / str(number)
        folder.mkdir()
        run = run_tiny(folder, (*questions, *changes))
        summary = json.loads((run / "summary.json").read_text())
        assert summary["status"] == "finished"
        assert set(summary["metrics"]) == {f"decoder/converged/{s}" for s in ("train", "test")}
        if survived is not None:
            assert set(summary["metrics"].values()) == {survived}
