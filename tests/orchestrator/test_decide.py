"""Single decisions, one behaviour each; what holds in all orders of events is in test_decide_machine.py."""

import dataclasses

import pytest

from hone.envs.retries import Retries
from hone.orchestrator import decide as d
from hone.orchestrator import events as e
from hone.schema.batches import BatchWanted, CheckpointSaved, StepDone
from hone.schema.traces import FailureClass

LIMITS = d.Limits(groups_per_batch=2, group_size=2, max_staleness=1, num_steps=4, max_concurrent=100)


def begin(**changes):
    state, commands = d.decide(d.State(dataclasses.replace(LIMITS, **changes)), e.EngineServes(0))
    return state, commands


def tell(state, *events):
    return d.decide(state, *events)[1]


def finish(state, number, *, rewards=(0.0, 1.0), version=0):
    return tell(state, *(e.RolloutFinished(number, attempt, reward, version) for attempt, reward in enumerate(rewards)))


def of(commands, kind):
    return [command for command in commands if isinstance(command, kind)]


def test_nothing_starts_before_the_engine_serves():
    assert tell(d.State(LIMITS), BatchWanted(1)) == []


def test_admission_fills_the_batches_that_are_in_time_and_no_more():
    state, commands = begin()
    assert of(commands, e.StartGroup) == [e.StartGroup(number, 0) for number in range(4)]
    assert tell(state, e.EngineServes(1)) == [e.StartGroup(4, 1), e.StartGroup(5, 1)]


def test_without_staleness_only_one_batch_is_under_way():
    _, commands = begin(max_staleness=0)
    assert len(of(commands, e.StartGroup)) == 2


def test_no_more_rollouts_run_than_allowed():
    state, commands = begin(max_concurrent=5)
    assert len(of(commands, e.StartGroup)) == 2
    assert finish(state, 0)[-1] == e.StartGroup(2, 0)


def test_a_batch_is_formed_from_the_first_to_finish():
    state, _ = begin()
    assert of(finish(state, 3), e.FormBatch) == []
    assert of(finish(state, 1), e.FormBatch) == [e.FormBatch(1, (3, 1))]


def test_the_last_batch_in_time_waits_for_its_straggler():
    state, _ = begin()
    for number in (3, 1):
        finish(state, number)
    tell(state, StepDone(1, ""), e.EngineServes(1))
    finish(state, 4, version=1)
    # Groups 0 and 2, admitted at version 0, must be in batch 2; group 4 may not take their place.
    assert of(finish(state, 2), e.FormBatch) == []
    assert of(finish(state, 0), e.FormBatch) == [e.FormBatch(2, (2, 0))]


def test_equal_rewards_are_filtered_and_their_place_is_filled():
    state, _ = begin()
    assert finish(state, 0, rewards=(1.0, 1.0)) == [e.FilterGroup(0), e.StartGroup(4, 0)]


def test_a_game_whose_rewards_add_up_to_the_same_trains_where_those_of_an_agent_differ():
    def play(number, *rewards):
        return tell(
            state, *(e.RolloutFinished(number, attempt, 0.0, 0, (own, -own)) for attempt, own in enumerate(rewards))
        )

    state, _ = begin()
    assert of(play(0, 1.0, -1.0), e.FinishGroup) == [e.FinishGroup(0)]
    assert of(play(1, 1.0, 1.0), e.FilterGroup) == [e.FilterGroup(1)]


def test_equal_rewards_train_when_nothing_is_filtered():
    state, _ = begin(filter_without_signal=False)
    assert finish(state, 0, rewards=(1.0, 1.0)) == [e.FinishGroup(0)]


@pytest.mark.parametrize(
    ("kind", "again"), [(FailureClass.SANDBOX, 2), (FailureClass.WORKER, 10), (FailureClass.ENVIRONMENT, 0)]
)
def test_a_failure_is_tried_again_as_often_as_its_class_allows(kind, again):
    state, _ = begin()
    for failures in range(1, again + 1):
        assert tell(state, e.RolloutFailed(0, 1, kind)) == [e.RunAgain(0, 1, {kind: failures})]
    assert tell(state, e.RolloutFailed(0, 1, kind)) == [e.GiveUpAttempt(0, 1, kind)]


def test_the_death_of_workers_leaves_the_other_retries_of_a_rollout_alone():
    state, _ = begin()
    for _ in range(5):
        tell(state, e.RolloutFailed(0, 1, FailureClass.WORKER))
    expected = {FailureClass.WORKER: 5, FailureClass.JUDGE: 1}
    assert tell(state, e.RolloutFailed(0, 1, FailureClass.JUDGE)) == [e.RunAgain(0, 1, expected)]


def test_a_cancelled_rollout_is_issued_again_without_counting():
    state, _ = begin()
    for _ in range(20):
        assert tell(state, e.RolloutFailed(0, 1, FailureClass.CANCELLED)) == [e.RunAgain(0, 1, {})]


@pytest.mark.parametrize("kind", [FailureClass.SANDBOX, FailureClass.CANCELLED])
def test_a_final_failure_is_not_tried_again(kind):
    state, _ = begin()
    assert tell(state, e.RolloutFailed(0, 1, kind, is_final=True)) == [e.GiveUpAttempt(0, 1, kind)]


def test_a_group_trains_with_two_valid_rollouts_and_not_with_one():
    state, _ = begin(group_size=3, retries=Retries({}))
    tell(state, e.RolloutFailed(0, 2, FailureClass.TOOL), e.RolloutFailed(1, 2, FailureClass.TOOL))
    assert of(finish(state, 0), e.FinishGroup) == [e.FinishGroup(0)]
    commands = tell(state, e.RolloutFailed(1, 1, FailureClass.JUDGE), e.RolloutFinished(1, 0, 1.0, 0))
    assert of(commands, e.DropGroup) == [e.DropGroup(1, FailureClass.JUDGE)]


def test_an_answer_after_the_outcome_is_passed_over():
    state, _ = begin()
    finish(state, 0)
    assert finish(state, 0) == []
    assert tell(state, e.RolloutFailed(0, 0, FailureClass.TOOL)) == []


def test_the_newest_weights_are_loaded_one_load_at_a_time():
    state, _ = begin()
    for number in range(4):
        finish(state, number)
    assert of(tell(state, StepDone(1, "")), e.LoadWeights) == [e.LoadWeights(1)]
    assert of(tell(state, StepDone(2, "")), e.LoadWeights) == []
    assert of(tell(state, e.EngineServes(1)), e.LoadWeights) == [e.LoadWeights(2)]
    assert of(tell(state, e.EngineServes(2)), e.LoadWeights) == []


def test_an_update_that_is_not_in_flight_waits_for_the_rollouts_and_holds_admission():
    state, _ = begin(in_flight_updates=False)
    for number in range(2):
        finish(state, number)
    assert tell(state, StepDone(1, "")) == [e.MarkTrained(1)]
    finish(state, 2)
    assert e.LoadWeights(1) in finish(state, 3)
    assert of(tell(state, e.EngineServes(1)), e.StartGroup) == [e.StartGroup(4, 1), e.StartGroup(5, 1)]


def test_versions_that_a_trainer_publishes_again_are_not_loaded():
    state, _ = begin()
    for number in range(4):
        finish(state, number)
    tell(state, StepDone(1, ""), StepDone(2, ""), e.EngineServes(2))
    assert of(tell(state, StepDone(1, "")), e.LoadWeights) == []


def test_a_batch_is_offered_when_it_is_there_and_again_when_asked_again():
    state, _ = begin()
    assert tell(state, BatchWanted(1)) == []
    finish(state, 0)
    assert e.OfferBatch(1) in finish(state, 1)
    assert tell(state, BatchWanted(1)) == [e.OfferBatch(1)]


def test_asking_for_a_step_tells_that_those_before_are_trained():
    state, _ = begin()
    finish(state, 0)
    finish(state, 1)
    assert tell(state, BatchWanted(2)) == [e.MarkTrained(1)]


def test_a_trainer_ahead_of_the_ledger_is_refused():
    state, _ = begin()
    with pytest.raises(d.TrainerMismatchError, match=r"step 3.*knows 0 batches"):
        tell(state, BatchWanted(3))


def test_a_trainer_without_its_checkpoint_is_refused():
    state, _ = begin()
    for number in range(4):
        finish(state, number)
    tell(state, CheckpointSaved(2, 2))
    with pytest.raises(d.TrainerMismatchError, match="put the checkpoint back"):
        tell(state, BatchWanted(1))


def test_an_engine_that_went_back_to_older_weights_costs_the_groups_that_cannot_be_in_time():
    state, _ = begin(max_staleness=0)
    for step in range(2):
        finish(state, 2 * step, version=step)
        finish(state, 2 * step + 1, version=step)
        tell(state, StepDone(step + 1, ""), e.EngineServes(step + 1))
    assert of(finish(state, 4, version=1), e.DropStaleGroup) == [e.DropStaleGroup(4)]


def test_evaluations_come_at_multiples_and_the_newest_wins():
    state, commands = begin(evaluate_every=2, num_steps=20)
    assert of(commands, e.StartEvaluation) == [e.StartEvaluation(0)]
    assert of(tell(state, e.EngineServes(2), e.EngineServes(5)), e.StartEvaluation) == []
    assert of(tell(state, e.EvaluationFinished(0, 0.5)), e.StartEvaluation) == [e.StartEvaluation(4)]


def test_a_good_evaluation_ends_training_at_the_last_offered_step():
    state, _ = begin(evaluate_every=1, stop_at_reward=0.9)
    finish(state, 0)
    finish(state, 1)
    tell(state, BatchWanted(1))
    commands = tell(state, e.EvaluationFinished(0, 0.95))
    assert of(commands, e.EndEarly)[0].last_step == 1
    assert of(commands, e.CancelGroup) == [e.CancelGroup(2), e.CancelGroup(3)]
    assert e.EndTraining(1) in tell(state, StepDone(1, ""), BatchWanted(2))
    assert tell(state, e.EngineServes(1)) == [e.StartEvaluation(1)]
    assert tell(state, e.EvaluationFinished(1, 0.2)) == [e.EndRun()]


def barren(state, kind, reward=1.0):
    number, commands = 0, []
    while not of(commands, (e.GiveUpRun, e.GiveUpCollapsed, e.EndEarly)):
        number = min(state.groups)
        if kind is None:
            commands = finish(state, number, rewards=(reward, reward))
        else:
            commands = tell(state, *(e.RolloutFailed(number, attempt, kind) for attempt in range(2)))
        assert number < 1000
    return number, commands


def test_a_run_whose_groups_never_have_a_signal_is_given_up():
    state, _ = begin()
    number, commands = barren(state, None)
    assert number + 1 == d.BARREN_BATCHES * LIMITS.groups_per_batch
    assert of(commands, e.GiveUpRun) == [e.GiveUpRun(number + 1, 0, None)]


def test_a_run_that_has_learned_everything_ends_in_order():
    state, _ = begin()
    finish(state, 0)
    finish(state, 1)
    tell(state, BatchWanted(1))
    _, commands = barren(state, None)
    assert of(commands, e.EndEarly)[0].last_step == 1


def test_a_policy_that_collapsed_is_not_taken_for_one_that_has_learned_everything():
    state, _ = begin()
    finish(state, 0)
    finish(state, 1)
    tell(state, BatchWanted(1))
    _, commands = barren(state, None, reward=0.0)
    assert of(commands, e.EndEarly) == []
    assert of(commands, e.GiveUpCollapsed) == [e.GiveUpCollapsed(d.BARREN_BATCHES * LIMITS.groups_per_batch, 0.0, 0.5)]


def test_a_run_in_which_everything_fails_is_given_up_with_the_class():
    state, _ = begin(retries=Retries({}))
    _, commands = barren(state, FailureClass.ENVIRONMENT)
    assert of(commands, e.GiveUpRun)[0].kind is FailureClass.ENVIRONMENT


def test_nothing_is_admitted_while_the_engine_is_away():
    state, _ = begin()
    tell(state, e.EngineLost())
    assert finish(state, 0, rewards=(1.0, 1.0)) == [e.FilterGroup(0)]
    assert tell(state, e.EngineServes(0)) == [e.StartGroup(4, 0)]


def test_the_same_events_give_the_same_commands():
    def history():
        state, commands = begin()
        return [commands, finish(state, 2), finish(state, 0), tell(state, BatchWanted(1)), tell(state, StepDone(1, ""))]

    assert history() == history()


def test_a_stuck_run_says_what_it_waits_for():
    state = d.State(LIMITS)
    assert d.waiting_for(state) == "the inference server to answer"
    tell(state, e.EngineServes(0))
    assert d.waiting_for(state) == "8 rollouts, the oldest of group 0"
    for number in range(4):
        finish(state, number)
    assert d.waiting_for(state) == "the trainer to ask for the batch of step 1"
    tell(state, BatchWanted(1))
    assert d.waiting_for(state) == "the trainer to finish step 1"
