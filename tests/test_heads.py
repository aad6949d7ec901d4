"""The backbone's attention heads: that copies attend as they do, the choice of them, the score that is fitted to them."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import CONTEXT, CONVERSATIONS, WITH_HEADS, assert_one_line, assistant, prompts_of, user
from transformers import AutoModelForCausalLM, Glm4MoeConfig, PreTrainedModel, Qwen2Config

from native_retrieval.heads import NUM_HEADS, Calibration, Maps, average_precision, calibrate, choose, fit_score
from processing_native_retrieval import word_keys

HEADS = [[layer, head] for layer in (1, 2) for head in range(4)]
LIBRARY = [
    user("Tell me about the library."),
    assistant("It was founded in 1846 by a teacher and a printer."),
    user("And when did they found it?"),
]
ROWS = [
    {"messages": LIBRARY, "rewrite": "When did the teacher and the printer found the libraries?"},
    {"messages": LIBRARY, "rewrite": ""},
    {"messages": LIBRARY, "rewrite": "When?"},  # takes nothing from earlier turns
    {"messages": LIBRARY[:1], "rewrite": "Tell me about the library."},
]


def tiny_backbone(family: str, make_backbone: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """With norms and biases that count, and windows longer than a prompt: copies know of none."""
    if family in WITH_HEADS:
        backbone = make_backbone(family, **({"sliding_window": CONTEXT} if family in ("gemma3", "mistral") else {}))
    else:
        own = make_backbone("llama").config.to_dict()
        fields = {name: own[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
        fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15}
        if family == "glm4_moe":  # turns half of each head; all layers without experts
            fields |= {"head_dim": 8, "partial_rotary_factor": 0.5, "first_k_dense_replace": 4, "use_qk_norm": True}
            fields |= {"n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
        backbone = AutoModelForCausalLM.from_config({"qwen2": Qwen2Config, "glm4_moe": Glm4MoeConfig}[family](**fields))
    backbone.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
        for layer in backbone.base_model.layers:
            layer.self_attn.q_proj.weight.mul_(8)  # attention that is nowhere near even
    return backbone.eval()


@pytest.mark.parametrize("family", [*WITH_HEADS, "qwen2", "glm4_moe"])
def test_copied_heads_attend_as_the_backbones_own(make_backbone, make_model, family: str):
    """Biases, norms of queries and keys, groups of keys, other speeds of turning, and a part that does not turn."""
    backbone, heads = tiny_backbone(family, make_backbone), [[layer, head] for layer in range(4) for head in range(4)]
    model = make_model(backbone=backbone, selection_heads=heads)
    ids, mask = model.processor.pad(prompts_of(model, [CONVERSATIONS[1], LIBRARY]))
    words, states = model.processor.read_words(ids, mask), model.prefill(ids, mask, use_cache=False).hidden_states
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        output = backbone(input_ids=ids, attention_mask=mask, position_ids=positions, output_attentions=True)
        for most in (48, 3):
            model.query_head.selection.NUM_PIECES = most
            seen = model.query_head.selection.attention(states, mask, words).unflatten(1, (4, 4, 2))
            for row in range(2):
                asking = words.positions[row][words.mask[row] & (words.turn_ids[row] == 1)][-most:]
                for layer, attention in enumerate(output.attentions):
                    wanted = torch.stack((attention[row, :, asking].mean(1), attention[row, :, -3:].mean(1)), dim=1)
                    torch.testing.assert_close(seen[row, layer], wanted, atol=5e-4, rtol=0)
    assert seen.std() > 0.005


def test_a_norm_that_subtracts_the_mean_is_not_copied(make_backbone, make_model, capsys):
    backbone = make_backbone("llama")
    for layer in backbone.base_model.layers:
        layer.input_layernorm = torch.nn.LayerNorm(32)
    model = make_model(backbone=backbone, selection_heads=None)
    assert "without attention" in capsys.readouterr().out and not model.config.selection_heads


@pytest.mark.parametrize("head", [[4, 0], [1, 4], [-1, 0]])
def test_heads_that_the_backbone_lacks_are_refused(make_model, head: list[int]):
    with pytest.raises(ValueError, match="selection_heads") as error:
        make_model(selection_heads=[[1, 0], head], hidden_state_layers=[1, 2, 4])
    assert_one_line(error)
    with pytest.raises(ValueError, match="selection_heads"):
        make_model("gpt2", selection_heads=[[1, 0]])


def test_without_heads_to_copy_the_words_of_the_last_turns_come_first(make_model, capsys):
    model = make_model("gpt2")
    assert "without attention: GPT2Model has no layers with q_proj" in capsys.readouterr().out
    earlier = [user("Bridges and lighthouses, please."), assistant("Castles, harbours."), user("Who?")]
    assert model.extract_query(earlier, num_words=2) == "Who? Castles harbours"


# The choice


def planted(name: str, seed: int, good: tuple[int, ...], words: int = 200) -> Calibration:
    """Features of `HEADS`, and one more: noise, but these columns are high for the words of the rewrite."""
    random = np.random.default_rng(seed)
    labels = random.random(words) < 0.2
    features = random.normal(size=(words, 2 * len(HEADS) + 1)).astype(np.float32)
    for column in good:
        features[:, column] += 4 * labels
    return Calibration(name, [features], [labels])


def test_a_planted_head_is_chosen_whichever_asks():
    heads, (chosen,) = choose([planted("a", 0, (2, 13))], HEADS, count=2)
    assert heads == [HEADS[1], HEADS[6]]
    assert chosen.features.shape == (200, 2 * 2 + 1) and chosen.num_turns == 1
    whole = planted("a", 0, (2, 13)).features
    assert np.array_equal(chosen.features, whole[:, [2, 3, 12, 13, 16]])


def test_a_head_must_hold_on_every_data_set():
    """The best of one is random on the other; the second best of both is taken."""
    one, two = planted("a", 0, (0, 4)), planted("b", 1, (10, 4))
    one.features[:, 0] += 4 * one.labels
    two.features[:, 10] += 4 * two.labels
    heads, parts = choose([one, two], HEADS, count=1)
    assert heads == [HEADS[2]] and len(parts) == 2


def test_average_precision():
    labels = np.array([True, False, True, False])
    assert average_precision(labels, np.array([4.0, 3.0, 2.0, 1.0])) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(labels, np.array([1.0, 2.0, 3.0, 4.0])) == pytest.approx((1 / 2 + 2 / 4) / 2)
    part = planted("a", 0, (5,))
    assert part.precisions(len(HEADS)).argmax() == 5 and len(part.precisions(len(HEADS))) == 16


def test_the_fitted_score_separates_words_of_the_rewrite(make_model):
    selection = make_model(selection_heads=HEADS).query_head.selection
    for noise in (planted("a", 0, ()), planted("a", 0, (3,))):
        noise.features[:, 7] = 5 * noise.features[:, 7] - 100  # features have scales of their own
        fit_score(selection, [noise])
    unseen = planted("a", 9, (3,))
    unseen.features[:, 7] = 5 * unseen.features[:, 7] - 100
    with torch.no_grad():
        scores = selection.score(torch.tensor(unseen.features)).squeeze(1).numpy()
    assert average_precision(unseen.labels, scores) > 0.95
    chance = 1 / (1 + np.exp(-scores))  # as well as it can be told
    assert chance.mean() == pytest.approx(unseen.labels.mean(), abs=0.1)


def test_every_data_set_weighs_the_same_in_the_score(make_model):
    selection = make_model(selection_heads=HEADS[:1]).query_head.selection
    values = np.array([-1.0, 1.0], np.float32)

    def part(copies: int, agrees: bool) -> Calibration:
        features = np.zeros((2 * copies, 3), np.float32)
        features[:, 0] = np.tile(values, copies)
        return Calibration("", [features], [(features[:, 0] > 0) == agrees])

    fit_score(selection, [part(500, True), part(5, False)])
    assert abs(selection.score.weight[0, 0].item()) < 1e-2
    fit_score(selection, [part(500, True), part(5, True)])
    assert selection.score.weight[0, 0].item() > 1


def test_conversations_are_read_as_the_head_will_read_them(make_model):
    model = make_model(selection_heads=HEADS)
    selection, layers = model.query_head.selection, model.query_head.layers
    found = calibrate(model.backbone, model.processor, selection, layers, "library", ROWS)
    assert found.num_turns == 1  # the other rows tell nothing
    # Tell, library, founded, 1846, teacher, printer
    assert found.labels.tolist() == [False, True, False, False, True, True]
    ids, mask = model.processor.pad([model.processor.encode(LIBRARY)])
    words = model.processor.read_words(ids, mask)
    with torch.no_grad():
        features, selectable = selection.features(model.prefill(ids, mask).hidden_states, mask, words)
    np.testing.assert_allclose(found.features, features[0, selectable[0]].numpy(), atol=1e-4)
    assert calibrate(model.backbone, model.processor, selection, layers, "nothing", ROWS[1:]) is None


def test_a_new_model_is_fitted_to_rewrites(make_backbone, make_model, capsys):
    """Which heads are tried, and that those that are named stay, in their order in the backbone."""
    everywhere = Maps(make_backbone("llama")).heads
    assert everywhere == [[layer, head] for layer in (1, 2, 3) for head in range(4)]
    rewrites = [("library", ROWS)]
    model = make_model(selection_heads=None, rewrites=rewrites)
    chosen = model.config.selection_heads
    assert len(chosen) == NUM_HEADS and chosen == sorted(chosen) and all(head in everywhere for head in chosen)
    plain = make_model(selection_heads=chosen)
    assert torch.equal(plain.query_head.selection.key, model.query_head.selection.key)
    assert not torch.equal(plain.query_head.selection.score.weight, model.query_head.selection.score.weight)
    assert model.extract_query(LIBRARY, num_words=3).split()[-3:] == ["library", "teacher", "printer"]
    named = [*reversed(everywhere[:10])]
    model = make_model(selection_heads=named, rewrites=rewrites)
    assert model.config.selection_heads == everywhere[:10]
    assert model.extract_query(LIBRARY, num_words=3).split()[-3:] == ["library", "teacher", "printer"]


@pytest.mark.parametrize(
    "texts",
    ["engine engines", "house houses", "class classes", "church churches", "box boxes", "city cities", "virus", "bus"],
)
def test_a_plural_is_the_same_word(texts: str):
    assert len(set(word_keys(texts.upper()))) == 1 and "" not in word_keys(texts)


def test_words_that_no_search_needs_have_no_key():
    assert word_keys("Who is the owner, and what's x?") == ["", "", "", "owner", "", "", "", ""]
    assert word_keys("A cat scratches a car and cares") == ["", "cat", "scratch", "", "car", "", "care"]
