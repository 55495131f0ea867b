import pytest
import torch

from hone.config.recipe import EngineSection
from hone.inference.engine.engine import Engine
from hone.inference.engine.scheduler import RequestTooLong
from hone.model import ops
from hone.model.checkpoint import save_model
from hone.model.layers.attention import PackedAttention
from hone.model.transformer import Transformer
from hone.schema.sampling import FinishReason, Generate, Generated, SamplingParameters

PLAIN = EngineSection(num_blocks=256, block_size=8, max_running=32, prefix_cache=False)


def prompts(count: int, shared: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    start = torch.randint(2, 96, (shared,), generator=generator).tolist()
    lengths = torch.randint(3, 40, (count,), generator=generator).tolist()
    return [start + torch.randint(2, 96, (length,), generator=generator).tolist() for length in lengths]


def requests(sampling: list[SamplingParameters], shared: int = 0) -> list[Generate]:
    pairs = zip(prompts(len(sampling), shared), sampling, strict=True)
    return [Generate(f"r{i}", prompt, one) for i, (prompt, one) in enumerate(pairs)]


def run(engine: Engine, wanted: list[Generate]) -> dict[str, Generated]:
    for request in wanted:
        engine.add(request)
    return finish(engine)


def finish(engine: Engine) -> dict[str, Generated]:
    done: dict[str, Generated] = {}
    while engine.has_work:
        done |= {f.generated.request_id: f.generated for f in engine.step().finished}
    return done


def full_logprobs(model: Transformer, token_ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """The logprob of each token after the first, computed in one pass without any cache."""
    tokens = torch.tensor(token_ids)
    with torch.no_grad():
        starts = torch.tensor([0, len(tokens)], dtype=torch.int32)
        hidden = model(tokens, torch.arange(len(tokens)), PackedAttention(starts, len(tokens)))
        return ops.token_logprobs(model.unembed(hidden)[:-1], tokens[1:], temperature)


def recompute_greedily(model: Transformer, prompt: list[int], count: int) -> list[int]:
    token_ids = list(prompt)
    for _ in range(count):
        tokens = torch.tensor(token_ids)
        with torch.no_grad():
            starts = torch.tensor([0, len(tokens)], dtype=torch.int32)
            hidden = model(tokens, torch.arange(len(tokens)), PackedAttention(starts, len(tokens)))
            token_ids.append(int(model.unembed(hidden[-1:]).argmax()))
    return token_ids[len(prompt) :]


def greedy(max_tokens: int = 12) -> SamplingParameters:
    return SamplingParameters(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def random(seed: int, max_tokens: int = 24) -> SamplingParameters:
    return SamplingParameters(seed=seed, max_tokens=max_tokens, ignore_eos=True)


def test_greedy_completions_equal_recomputing_everything_for_each_token(model):
    wanted = requests([greedy()] * 6)
    done = run(Engine(model, [1], PLAIN), wanted)
    assert [done[r.request_id].token_ids for r in wanted] == [
        recompute_greedily(model, r.prompt_token_ids, 12) for r in wanted
    ]


def test_logprobs_are_those_of_the_whole_sequence_in_one_pass(model):
    sampling = SamplingParameters(temperature=0.7, seed=5, max_tokens=30, ignore_eos=True)
    [request] = requests([sampling])
    done = run(Engine(model, [1], PLAIN), [request])["r0"]
    whole = full_logprobs(model, request.prompt_token_ids + done.token_ids, 0.7)[len(request.prompt_token_ids) - 1 :]
    assert torch.equal(torch.tensor(done.logprobs), whole)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_running": 3},
        {"max_batch_tokens": 32},
        {"max_batch_tokens": 5, "max_running": 5},
        {"block_size": 1, "num_blocks": 2048},
        {"prefix_cache": True},
        {"num_blocks": 12, "prefix_cache": True},
        {"num_blocks": 12},
    ],
    ids=str,
)
def test_what_is_sampled_does_not_depend_on_batching_paging_caching_or_preemption(model, changes):
    wanted = requests([random(i) for i in range(10)], shared=19)
    alone = {}
    for request in wanted:
        alone |= run(Engine(model, [1], PLAIN), [request])
    engine = Engine(model, [1], PLAIN.model_copy(update=changes))
    together = run(engine, wanted)
    for request in wanted:
        one, other = alone[request.request_id], together[request.request_id]
        assert (one.token_ids, one.logprobs) == (other.token_ids, other.logprobs)
    assert (engine.num_preemptions > 0) == (changes.get("num_blocks") == 12)
    assert any(done.num_cached_tokens for done in together.values()) == changes.get("prefix_cache", False)


def test_all_kinds_of_sampling_in_one_batch_do_not_disturb_one_another(model):
    kinds = [
        greedy(),
        random(1),
        SamplingParameters(seed=2, top_k=3, max_tokens=12),
        SamplingParameters(seed=3, top_p=0.5, temperature=1.4, max_tokens=12),
        SamplingParameters(seed=4, min_p=0.2, max_tokens=12),
        SamplingParameters(seed=5, logit_bias={7: 50.0}, max_tokens=12),
        SamplingParameters(seed=6, top_logprobs=3, max_tokens=12),
    ]
    wanted = requests(kinds)
    together = run(Engine(model, [1], PLAIN), wanted)
    for request in wanted:
        assert run(Engine(model, [1], PLAIN), [request])[request.request_id] == together[request.request_id]
    assert set(together["r5"].token_ids) == {7}


def test_a_request_without_a_seed_draws_one_from_its_name(model):
    unseeded = SamplingParameters(max_tokens=20, ignore_eos=True)
    first = run(Engine(model, [1], PLAIN), [Generate("a", [5, 6], unseeded), Generate("b", [5, 6], unseeded)])
    again = run(Engine(model, [1], PLAIN), [Generate("a", [5, 6], unseeded)])
    assert first["a"].token_ids == again["a"].token_ids != first["b"].token_ids


def test_an_end_token_stops_and_is_kept(model):
    sampling = SamplingParameters(temperature=0, logit_bias={1: 100.0})
    done = run(Engine(model, [1], PLAIN), [Generate("a", [5], sampling)])["a"]
    assert (done.token_ids, done.finish_reason) == ([1], FinishReason.STOP)


def test_a_stop_token_of_the_request_stops(model):
    sampling = SamplingParameters(temperature=0, logit_bias={9: 100.0}, stop_token_ids=(9,), ignore_eos=True)
    assert run(Engine(model, [1], PLAIN), [Generate("a", [5], sampling)])["a"].token_ids == [9]


def test_a_stop_string_over_several_tokens_stops_but_not_within_the_prompt(model):
    def decode(token_ids):
        return "".join("ab"[token % 2] for token in token_ids)

    sampling = SamplingParameters(seed=1, stop=("abb",), max_tokens=100, ignore_eos=True)
    done = run(Engine(model, [1], PLAIN, decode=decode), [Generate("a", [4, 5, 5], sampling)])["a"]
    assert done.finish_reason is FinishReason.STOP
    assert decode(done.token_ids).find("abb") == len(done.token_ids) - 3


def test_stop_strings_without_a_tokenizer_are_refused(model):
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        Engine(model, [1], PLAIN).add(Generate("a", [4], SamplingParameters(stop=("x",))))


def test_the_context_ends_a_completion(model):
    engine = Engine(model, [1], PLAIN.model_copy(update={"max_context": 16}))
    done = run(engine, [Generate("a", [4] * 10, SamplingParameters(ignore_eos=True))])["a"]
    assert (len(done.token_ids), done.finish_reason) == (6, FinishReason.LENGTH)


def test_a_prompt_as_long_as_the_context_is_refused(model):
    with pytest.raises(RequestTooLong):
        Engine(model, [1], PLAIN).add(Generate("a", [4] * 256, SamplingParameters()))


def test_unknown_tokens_are_refused(model):
    with pytest.raises(ValueError, match="the prompt names token 400, but the vocabulary has 96"):
        Engine(model, [1], PLAIN).add(Generate("a", [4, 400], SamplingParameters()))


def test_a_cancelled_request_frees_its_blocks(model):
    engine = Engine(model, [1], PLAIN)
    engine.add(Generate("a", [4] * 50, random(1)))
    engine.step()
    assert engine.kv_usage > 0
    assert engine.cancel("a")
    assert (engine.kv_usage, engine.has_work, engine.cancel("a")) == (0.0, False, False)


def test_the_likeliest_tokens_come_with_their_logprobs(model):
    engine = Engine(model, [1], PLAIN)
    engine.add(Generate("a", [4, 5], SamplingParameters(temperature=0, top_logprobs=4, max_tokens=3, ignore_eos=True)))
    tokens = []
    while engine.has_work:
        [done] = engine.step().finished or [None]
    for token, logprob, alternatives in zip(
        done.generated.token_ids, done.generated.logprobs, done.top_logprobs, strict=True
    ):
        assert len(alternatives) == 4
        assert alternatives[0][0] == token
        assert alternatives[0][1] == pytest.approx(logprob, abs=1e-5)
        tokens.append(token)
    assert len(tokens) == 3


def test_a_streaming_request_tells_every_token(model):
    engine = Engine(model, [1], PLAIN)
    engine.add(Generate("a", [4, 5], random(1, 5)), streams=True)
    new, done = [], []
    while engine.has_work:
        result = engine.step()
        new += result.new_tokens
        done += result.finished
    assert [token.token_id for token in new] == done[0].generated.token_ids


def copy_of(model) -> Transformer:
    copied = Transformer(model.config)
    copied.load_state_dict(model.state_dict())
    return copied


@pytest.fixture
def other(model) -> Transformer:
    return Transformer(model.config).initialize(1)


def test_unfinished_requests_go_on_under_new_weights_and_every_token_tells_its_version(model, other):
    engine = Engine(copy_of(model), [1], PLAIN, version=3)
    [request] = requests([random(1, 20)])
    engine.add(request)
    for _ in range(6):
        engine.step()
    engine.load_weights(other.state_dict(), 4)
    done = finish(engine)["r0"]
    before = run(Engine(model, [1], PLAIN), [request])["r0"]
    assert [(run.version, run.count) for run in done.versions] == [(3, 6), (4, 14)]
    assert done.token_ids[:6] == before.token_ids[:6]
    assert done.token_ids != before.token_ids


def test_after_new_weights_new_requests_are_served_as_if_there_had_been_no_others(model, other):
    engine = Engine(copy_of(model), [1], PLAIN.model_copy(update={"prefix_cache": True}))
    [request] = requests([random(1)], shared=40)
    run(engine, [request])
    engine.load_weights(other.state_dict(), 1)
    done = run(engine, [request])["r0"]
    expected = run(Engine(other, [1], PLAIN, version=1), [request])["r0"]
    assert done == expected


def test_a_request_that_waits_while_weights_change_is_of_the_new_version_only(model, other):
    engine = Engine(copy_of(model), [1], PLAIN)
    [request] = requests([random(1, 5)])
    engine.add(request)
    engine.load_weights(other.state_dict(), 9)
    assert [(run.version, run.count) for run in finish(engine)["r0"].versions] == [(9, 5)]


def test_weights_are_loaded_from_a_folder(model, other, tmp_path):
    save_model(other, other.config, tmp_path / "v1")
    engine = Engine(copy_of(model), [1], PLAIN)
    engine.load_weights(tmp_path / "v1", 1)
    assert all(torch.equal(a, b) for a, b in zip(engine.model.parameters(), other.parameters(), strict=True))


def test_a_broken_folder_changes_nothing(model, other, tmp_path):
    save_model(other, other.config, tmp_path / "v1")
    path = tmp_path / "v1" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    engine = Engine(copy_of(model), [1], PLAIN)
    with pytest.raises((ValueError, OSError, RuntimeError), match="safetensors"):
        engine.load_weights(tmp_path / "v1", 1)
    assert engine.version == 0
    assert all(torch.equal(a, b) for a, b in zip(engine.model.parameters(), model.parameters(), strict=True))


def test_weights_that_are_not_finite_are_reported_and_not_sampled_from(model):
    broken = copy_of(model)
    broken.embedding.data.fill_(float("nan"))
    engine = Engine(broken, [1], PLAIN)
    engine.add(Generate("a", [4], random(1, 3)))
    finished = []
    while engine.has_work:
        finished += engine.step().finished
    assert finished[0].failure == "the weights of version 0 give logits that are not finite"


def test_a_cache_smaller_than_a_block_is_refused(model):
    with pytest.raises(ValueError, match=r"engine.cache_bytes 10 is less than one KV block"):
        Engine(model, [1], EngineSection(cache_bytes=10))
