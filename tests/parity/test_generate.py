"""Every family with a cache: tokens a few at a time against the whole, and generation against transformers'."""

import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.base.errors import ShapeError
from mechjax.models import Cache
from tests.parity import test_experts
from tests.parity.cases import CASES, D_VOCAB, N_BATCH, N_POS, pair, quick
from tests.parity.test_parity import assert_close

torch = pytest.importorskip("torch", reason="parity needs PyTorch")

# One case rotates longer texts by other angles, which keys in a cache cannot follow: it is refused, as tested below.
every_case = pytest.mark.parametrize(
    "name", quick({"gpt2", "llama_gqa", "gemma_2", "bloom"}, [name for name in CASES if name != "phi_3_long"])
)
MASK = np.ones((N_BATCH, N_POS), bool)
MASK[0, :3] = False  # padding at the left, as transformers' generation has it
N_TOKENS = 6


@every_case
def test_cache__tokens_a_few_at_a_time__equals_the_whole(name):
    case = pair(name)
    cache = Cache.empty(case.model.config, N_BATCH, N_POS)
    logits = []
    for start, end in ((0, 4), (4, 5), (5, 6), (6, N_POS)):
        piece, cache = case.model(
            case.tokens[:, start:end], mask=jnp.asarray(MASK[:, start:end]), cache=cache
        )
        logits.append(piece)
    whole = np.asarray(case.model(case.tokens, mask=jnp.asarray(MASK)))
    assert_close(np.concatenate(logits, 1)[MASK], whole[MASK])


def assert_generates_alike(model, hf, tokens):
    """Greedy generation of both after left padding: the same tokens with the same probabilities."""
    ours = mj.generate(model, mj.Prompts(jnp.asarray(tokens), jnp.asarray(MASK)), N_TOKENS)
    with torch.no_grad():
        theirs = hf.generate(
            torch.from_numpy(np.where(MASK, tokens, 0)), attention_mask=torch.from_numpy(MASK.astype(int)),
            max_new_tokens=N_TOKENS, min_new_tokens=N_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=D_VOCAB + 1,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    np.testing.assert_array_equal(ours.tokens, theirs.sequences[:, N_POS:])
    log_probs = torch.stack(theirs.logits, 1).log_softmax(-1).gather(-1, theirs.sequences[:, N_POS:, None])
    assert_close(ours.log_probs, log_probs[..., 0].numpy())


@every_case
def test_generate__greedy_with_left_padding__equals_transformers(name):
    case = pair(name)
    assert_generates_alike(case.model, case.hf, case.tokens)


@pytest.mark.parametrize("name", quick({"deepseek_v3"}, ["mixtral", "gpt_oss", "deepseek_v2", "deepseek_v3"]))
def test_generate__with_experts_or_latent_attention__equals_transformers(name):
    hf, model = test_experts.pair(name)
    assert_generates_alike(model, hf, test_experts.TOKENS)


def test_generate__past_the_length_where_angles_change__is_refused():
    case = pair("phi_3_long")
    with pytest.raises(ShapeError, match="the keys it keeps would be turned wrongly from there on"):
        mj.generate(case.model, case.tokens[:, :2], 8)
