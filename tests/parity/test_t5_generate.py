"""Generation with encoder-decoders: against transformers, and against the whole text again for every token."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.base.errors import ArgumentError, ShapeError, SiteError
from mechjax.models.t5_runs import T5Runs
from mechjax.studies.check import CHECKS, Run
from tests.parity.cases import quick, torch
from tests.parity.test_t5 import N_POS, assert_close, pair

PADDED = np.arange(N_POS) >= np.array([[0], [3]])
N_TOKENS = 6


@pytest.mark.parametrize("name", quick({"t5"}, ["t5", "umt5"]))
def test_generate__greedy_with_padding__equals_transformers(name):
    hf, model, texts = pair(name)
    ours = mj.generate(model, mj.Prompts(jnp.asarray(texts[0]), jnp.asarray(PADDED)), N_TOKENS)
    with torch.no_grad():
        right = hf.generate(
            torch.from_numpy(np.where(PADDED, texts[0], 0)), attention_mask=torch.from_numpy(PADDED.astype(int)),
            max_new_tokens=N_TOKENS, min_new_tokens=N_TOKENS, do_sample=False, decoder_start_token_id=0, pad_token_id=0,
            eos_token_id=32, return_dict_in_generate=True, output_logits=True,
            use_cache=False,  # its cache has as many layers as the encoder
        )  # fmt: skip
    np.testing.assert_array_equal(ours.tokens, right.sequences[:, 1:])
    log_probs = torch.stack(right.logits, 1).log_softmax(-1).gather(-1, right.sequences[:, 1:, None])
    assert_close(ours.log_probs, log_probs[..., 0].numpy())


def test_generate__with_edits_and_captures__equals_the_whole_text_again():
    _, model, texts = pair("t5")
    edits = [
        mj.scale("encoder.z", 0.3, layer=1, head=2, pos=[1, -1]), mj.scale("cross_v", 0.5, layer=2),
        mj.scale("mlp_post", 0.2, layer=0), mj.zero("z", layer=1, head=0, pos=7),
        mj.scale("cross_pattern", 0.5, layer=0, key=-2),
    ]  # fmt: skip
    start, mask = texts[1][:, :4], jnp.asarray(PADDED)
    found = mj.generate(
        model, texts[0], 6, mask=mask, decoder_prompts=start, edits=edits,
        capture=["encoder.resid_post", "cross_attn_out", "cross_k"],
    )  # fmt: skip
    whole = np.concatenate((start, found.tokens), 1)[:, :-1]
    logits, acts = mj.run(
        model, texts[0], whole, mask=mask, edits=edits, capture=["encoder.resid_post", "cross_attn_out"]
    )
    logits = logits[:, 3:]
    np.testing.assert_array_equal(logits.argmax(-1), found.tokens)
    log_probs = np.take_along_axis(jax.nn.log_softmax(logits, -1), np.asarray(found.tokens)[..., None], -1)[
        ..., 0
    ]
    assert_close(found.log_probs, log_probs)
    unedited = mj.generate(model, texts[0], 6, mask=mask, decoder_prompts=start)
    assert np.abs(unedited.log_probs - found.log_probs).max() > 1e-3
    real = PADDED[None, ..., None]
    right = np.asarray(acts["encoder.resid_post"])
    assert_close(np.where(real, found.prompt_acts["encoder.resid_post"], 0), np.where(real, right, 0))
    assert_close(found.prompt_acts["cross_attn_out"], np.asarray(acts["cross_attn_out"][:, :, :4]))
    assert_close(found.acts["cross_attn_out"], np.asarray(acts["cross_attn_out"][:, :, 4:]))
    assert {site.name for site in found.acts.sites} == {"cross_attn_out"}


@pytest.mark.slow
def test_check__of_a_decoder_that_forgets_its_keys__is_wrong(monkeypatch):
    _, model, texts = pair("t5")
    run = Run(model, *texts, np.asarray(model(*texts)), {})
    ((where, found, right),) = CHECKS["cache against full forward"](run)
    assert where == "token by token" and found.shape[1] == texts[1].shape[1] // 2 + 1
    assert_close(found, right)
    filled = T5Runs.filled

    def forgetful(runs, *given):
        after = filled(runs, *given)
        return eqx.tree_at(lambda c: c.keys, after, after.keys.at[0].set(0.0))

    monkeypatch.setattr(T5Runs, "filled", forgetful)
    ((_, found, right),) = CHECKS["cache against full forward"](run)
    assert np.abs(found - right)[:, 1:].max() > 1e-2


def test_generate__of_what_cannot_be__is_refused():
    _, model, texts = pair("t5")
    with pytest.raises(
        SiteError, match=r"at_steps: .*`encoder.z` is computed once, before any token is generated"
    ):
        mj.generate(model, texts[0], 3, edits=[mj.models.at_steps(mj.zero("encoder.z"), 1)])
    with pytest.raises(SiteError, match=r"12 is out of range"):
        mj.generate(model, texts[0], 3, edits=[mj.zero("z", pos=12)])
    with pytest.raises(ShapeError, match=r"`decoder_prompts` has shape \(1, 12\)"):
        mj.generate(model, texts[0], 3, decoder_prompts=texts[1][:1])
    with pytest.raises(ArgumentError, match="generate takes a decoder, and this T5 is an encoder alone"):
        mj.generate(pair("t5_encoder")[1], texts[0], 3)
    with pytest.raises(ArgumentError, match="`decoder_prompts` are those of an encoder-decoder"):
        mj.generate(mj.load("induction-2l")[0], [[1, 2]], 3, decoder_prompts=[[1]])
