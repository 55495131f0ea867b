from hone.config.load import recipe_from
from hone.envs.retries import DEFAULT, NO_FAILURES, Retries, counted, total
from hone.orchestrator.settings import retries_of
from hone.schema.traces import FailureClass


def num_attempts(retries, kinds):
    """How many attempts are made of a rollout that fails with these classes in turn."""
    failures = NO_FAILURES
    for number, kind in enumerate(kinds, 1):
        failures = counted(failures, kind)
        if not retries.permit(failures, kind):
            return number
    return len(kinds) + 1


def test_each_class_has_retries_of_its_own():
    judge, sandbox, worker = FailureClass.JUDGE, FailureClass.SANDBOX, FailureClass.WORKER
    assert num_attempts(Retries(), [judge] * 9) == 3
    assert num_attempts(Retries(), [judge, sandbox, judge, sandbox, worker, judge]) == 6
    assert num_attempts(Retries({judge: 4}), [judge] * 9) == 5
    assert num_attempts(Retries({judge: 4}), [sandbox] * 9) == 1


def test_a_cancellation_is_no_failure():
    assert num_attempts(Retries({}), [FailureClass.CANCELLED] * 50) == 51
    assert total(counted(NO_FAILURES, FailureClass.CANCELLED)) == 0


def test_a_recipe_without_retries_has_the_defaults_and_one_with_some_has_those():
    tree = {"model": {"path": "unused"}}
    assert dict(retries_of(recipe_from(tree, "test")).allowed) == dict(DEFAULT)
    recipe = recipe_from(tree | {"retries": {"environment": 1}}, "test")
    assert retries_of(recipe).allowed == {**DEFAULT, FailureClass.ENVIRONMENT: 1}
