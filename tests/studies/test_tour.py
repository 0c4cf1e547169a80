"""The tour's mechanics on a small untrained decoder, and its claims on the model that ships."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import mechjax as mj
from mechjax.base.errors import ArgumentError, WriteError
from mechjax.models import Config
from mechjax.studies.tour import explore, tour
from mechjax.tasks.vocabulary import build_tokenizer
from tests.tolerances import TOL


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    config = Config(d_vocab=tokenizer.vocab_size, n_ctx=64, d_model=16, n_layers=2, n_heads=4)
    return mj.init(config, key=jax.random.key(0))


@pytest.fixture(scope="module")
def pairs(tokenizer):
    return mj.tasks.ioi(tokenizer, 4, seed=3)


@pytest.fixture(scope="module")
def found(model, tokenizer, pairs):
    return explore(model, tokenizer, pairs, name="stand-in")


def _metric(model, pairs, edits, prompts):
    metric = mj.metrics.logit_diff(pairs.correct, pairs.wrong)
    return metric(mj.intervene(model, edits)(prompts), prompts.mask)


@pytest.mark.slow
def test_explore__heads__equal_a_loop_over_interventions(found, model, pairs):
    _, acts = mj.capture(model, ["z", "resid_pre"])(pairs.clean)
    clean, corrupt = (_metric(model, pairs, [], side).mean() for side in (pairs.clean, pairs.corrupt))
    edit = mj.replace("z", acts["z"][1, :, :, 2], layer=1, head=2)
    one = (_metric(model, pairs, [edit], pairs.corrupt).mean() - corrupt) / (clean - corrupt)
    # A random model's gap is small, so what is divided by it loses digits.
    assert_allclose(found.heads[1, 2], one, rtol=1e-3)
    assert_allclose(found.intact, clean, **TOL["float32", "sweep"])


@pytest.mark.slow
def test_explore__residual_at_roles__equals_patching_there(found, model, pairs):
    _, acts = mj.capture(model, ["resid_pre"])(pairs.clean)
    clean, corrupt = (_metric(model, pairs, [], side).mean() for side in (pairs.clean, pairs.corrupt))
    where = pairs.positions["S2"][:, None]
    edit = mj.replace("resid_pre", acts["resid_pre"][1], layer=1, pos=where)
    one = (_metric(model, pairs, [edit], pairs.corrupt).mean() - corrupt) / (clean - corrupt)
    assert_allclose(found.residual[1, found.roles.index("S2")], one, rtol=1e-3)


def test_explore__ablation__equals_putting_the_mean_in_the_leading_heads_by_hand(found, model, pairs):
    _, acts = mj.capture(model, ["z"])(pairs.clean)
    mean = acts["z"][:, pairs.clean.mask].mean(1)  # over the real tokens of all prompts
    edits = [mj.replace("z", mean[layer, head], layer=layer, head=head) for layer, head in found.leading]
    left = _metric(model, pairs, edits, pairs.clean).mean()
    assert_allclose(found.ablated, left, **TOL["float32", "sweep"])


def test_explore__random_triples__leave_the_leading_heads_alone(found):
    assert found.random.shape == (20,)
    assert len(set(np.asarray(found.random).tolist())) > 1
    assert found.leading == tuple(
        divmod(int(i), found.heads.shape[1]) for i in np.argsort(-np.asarray(found.heads), axis=None)[:3]
    )


def test_explore__story__is_one_of_the_prompts(found, pairs, tokenizer):
    texts = [tuple(tokenizer.str_tokens(text)) for text in pairs.clean_text]
    which = texts.index(found.story.tokens)
    assert found.story.residual.shape == (2, len(found.story.tokens))
    assert_allclose(found.story.patterns.sum(-1), 1.0, **TOL["float32", "parity"])
    assert found.story.tokens[found.story.at[2]] == found.story.tokens[found.story.at[1]]  # S2 is S1's name
    assert tokenizer.token(found.story.answer) == int(pairs.correct[which])
    looked = np.asarray(found.looks)
    assert (looked[:, 0, 3] == 0).all(), "no word sees the one after it"


def test_explore__by_hand__times_every_stage(found):
    assert found.seconds[0][0] == "Patching the residual stream"
    assert len(found.seconds) == 5


def test_explore__of_a_model_with_few_heads__is_refused(tokenizer, pairs):
    config = Config(d_vocab=tokenizer.vocab_size, n_ctx=64, d_model=8, n_layers=1, n_heads=4)
    with pytest.raises(ArgumentError, match="the model has 4 heads; comparing 3 heads with 3 others needs 6"):
        explore(mj.init(config, key=jax.random.key(0)), tokenizer, pairs, name="x")


def test_explore__of_another_task__is_refused(model, tokenizer):
    with pytest.raises(ArgumentError, match="the tour is about indirect objects and reads IO, S1, S2, END"):
        explore(model, tokenizer, mj.tasks.pronouns(tokenizer, 2), name="x")


def test_tour__of_one_prompt__is_refused():
    with pytest.raises(ArgumentError, match="n=1 prompts asked for"):
        tour(n=1)


def test_tour__browser_without_a_page__is_refused():
    with pytest.raises(ArgumentError, match="needs a page to show"):
        tour(open_browser=True)


def test_tour__where_no_page_can_be_written__is_refused_before_the_work(tmp_path):
    with pytest.raises(WriteError, match="cannot write the page"):
        tour(tmp_path)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    path = tmp_path_factory.mktemp("tour") / "tour.html"
    return tour(path), path


def test_tour__of_the_shipped_model__names_heads_that_it_needs(shipped):
    found, path = shipped
    assert found.drop >= 0.5
    assert (found.heads >= jnp.min(jnp.asarray([found.heads[head] for head in found.leading]))).sum() == 3
    assert f"answer is {found.story.answer.strip()}" in path.read_text()


def test_tour__of_the_shipped_model__leading_heads_matter_three_times_as_much_as_others(shipped):
    assert shipped[0].drop >= 3 * max(shipped[0].random_drop, 0.0)


def test_tour__of_the_shipped_model__finds_the_answer_move_from_s2_to_end(shipped):
    residual = np.asarray(shipped[0].residual)
    roles = shipped[0].roles
    assert_allclose(residual[0], [0.0, 0.0, 1.0, 0.0], atol=1e-4)  # only S2's token differs
    assert roles[int(residual[-1].argmax())] == "END"


def test_tour__saved__comes_back_whole(shipped, tmp_path):
    found, _ = shipped
    back = mj.restore(mj.save(found, tmp_path))
    assert back.page.html == found.page.html
