"""Tasks from files and data sets: lazy, the same task at the same index, errors that name file, line and field."""

import json

import pytest

from hone.envs import Task, TaskSourceError, columns, dataset_tasks, jsonl_tasks, parquet_tasks, system, user
from public_data import ABSENT, DATA

GSM8K = DATA / "gsm8k" / "test.jsonl"

ROWS = [{"question": f"What is {n} + {n}?", "answer": str(2 * n), "level": n % 3} for n in range(100)]

question = columns("question", "answer")


def task(n):
    return Task(prompt=(user(f"What is {n} + {n}?"),), reference=str(2 * n))


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(map(json.dumps, ROWS)) + "\n")
    return path


@pytest.fixture
def parquet(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is an extra")
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=30)
    return path


@pytest.fixture
def folder(tmp_path, parquet, monkeypatch):
    """A data set as it lies on the Hugging Face hub."""
    datasets = pytest.importorskip("datasets", reason="datasets is an extra")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    data = tmp_path / "doubling" / "data"
    data.mkdir(parents=True)
    parquet.rename(data / "train-00000-of-00001.parquet")
    (data / "test-00000-of-00001.parquet").write_bytes((data / "train-00000-of-00001.parquet").read_bytes())
    (data.parent / "README.md").write_text("---\nlicense: mit\n---\n# Doubling\n")
    return str(data.parent)


def test_lines_are_tasks_in_any_order_and_blank_lines_are_passed_over(jsonl):
    tasks = jsonl_tasks(jsonl, question)
    assert tasks.count == 100
    assert [tasks[n] for n in (99, 0, 42)] == [task(99), task(0), task(42)]


def test_a_file_is_opened_when_a_task_is_asked_for(tmp_path):
    tasks = jsonl_tasks(tmp_path / "missing.jsonl", question).shuffled(0)
    with pytest.raises(TaskSourceError, match=r"cannot read .*missing\.jsonl: No such file"):
        tasks[0]


def test_a_missing_field_is_named_with_file_and_line(jsonl):
    with pytest.raises(TaskSourceError, match=r"rows\.jsonl, line 7: no field 'solution'; it has question, answer"):
        jsonl_tasks(jsonl, columns("question", "solution"))[3]


def test_a_field_of_the_wrong_type_is_named_with_file_and_line(jsonl):
    with pytest.raises(TaskSourceError, match=r"rows\.jsonl, line 3: field 'level' is neither text nor a list"):
        jsonl_tasks(jsonl, columns("level"))[1]
    with pytest.raises(TaskSourceError, match=r"line 3: field 'level' is int, not text"):
        jsonl_tasks(jsonl, lambda row: Task((user(row.text("level")),)))[1]


def test_what_the_authors_function_raises_is_told_with_file_and_line(jsonl):
    with pytest.raises(TaskSourceError, match=r"line 1: no task can be made of it: ZeroDivisionError"):
        jsonl_tasks(jsonl, lambda row: 1 / 0)[0]
    with pytest.raises(TaskSourceError, match=r"line 1: the function made str of it, not a Task"):
        jsonl_tasks(jsonl, lambda row: "task")[0]


@pytest.mark.parametrize(("line", "complaint"), [("{oops", "not valid JSON"), ("[1]", "list, not an object")])
def test_a_line_that_is_no_object_is_named(tmp_path, line, complaint):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "?"}\n' + line + "\n")
    with pytest.raises(TaskSourceError, match=f"line 2: {complaint}"):
        jsonl_tasks(path, columns("question"))[1]


def test_a_file_that_changes_under_us_is_noticed(jsonl):
    tasks = jsonl_tasks(jsonl, question)
    assert tasks[0] == task(0)
    jsonl.write_text(json.dumps(ROWS[1]) + "\n")
    with pytest.raises(TaskSourceError, match="has changed since"):
        tasks[0]


def test_a_prompt_may_be_a_conversation(tmp_path):
    path = tmp_path / "chats.jsonl"
    messages = [{"role": "system", "content": "Be brief.", "name": None}, {"role": "user", "content": "Hi"}]
    path.write_text(
        json.dumps({"messages": messages, "id": 7}) + "\n" + json.dumps({"messages": [{"role": "god"}], "id": 8})
    )
    tasks = jsonl_tasks(path, columns("messages", "id", info=["id"]))
    assert tasks[0] == Task((system("Be brief."), user("Hi")), "7", {"id": 7})
    with pytest.raises(TaskSourceError, match=r"line 2: field 'messages' is no conversation: .*god"):
        tasks[1]


def test_instructions_come_before_the_prompt(jsonl):
    found = jsonl_tasks(jsonl, columns("question", "answer", instructions="Answer with a number."))[0]
    assert found.prompt == (system("Answer with a number."), user("What is 0 + 0?"))


def test_rows_of_a_parquet_file_are_tasks_in_any_order(parquet):
    tasks = parquet_tasks(parquet, question, fields=["question", "answer"])
    assert tasks.count == 100
    assert [tasks[n] for n in (99, 0, 30, 29, 59)] == [task(n) for n in (99, 0, 30, 29, 59)]


def test_no_more_of_a_parquet_file_stays_in_memory_than_allowed(parquet):
    from hone.envs.rows import _Parquet

    file = _Parquet(parquet, None, cache_bytes=1)
    for n in (0, 40, 99, 0):
        assert file.row(n)["answer"] == str(2 * n)
        assert len(file._groups) == 1
    roomy = _Parquet(parquet, None, cache_bytes=2**20)
    assert [roomy.row(n)["answer"] for n in (0, 35, 65, 95)] == [str(2 * n) for n in (0, 35, 65, 95)]
    assert len(roomy._groups) == 4


def test_what_is_wrong_with_a_parquet_file_is_named(parquet, tmp_path):
    with pytest.raises(TaskSourceError, match=r"no field 'solution'; it has question, answer, level"):
        parquet_tasks(parquet, question, fields=["solution"])[0]
    with pytest.raises(TaskSourceError, match=r"rows\.parquet, row 31: no field 'solution'"):
        parquet_tasks(parquet, columns("solution"))[31]
    other = tmp_path / "other.parquet"
    other.write_text("hello")
    with pytest.raises(TaskSourceError, match="not a parquet file"):
        parquet_tasks(other, question)[0]
    with pytest.raises(TaskSourceError, match=r"cannot read .*none\.parquet"):
        parquet_tasks(tmp_path / "none.parquet", question)[0]


def test_a_hugging_face_data_set_is_loaded_by_name_and_split(folder):
    tasks = dataset_tasks(folder, question, split="test")
    assert tasks.count == 100
    assert [tasks[n] for n in (99, 0, 42)] == [task(99), task(0), task(42)]
    with pytest.raises(TaskSourceError, match=r"doubling, split test, row 5: no field 'solution'"):
        dataset_tasks(folder, columns("solution"), split="test")[5]


def test_a_streamed_data_set_is_endless_and_resumes_anywhere(folder):
    tasks = dataset_tasks(folder, question, streaming=True)
    assert tasks.count is None
    assert [tasks[n] for n in (0, 1, 99, 100, 142)] == [task(n) for n in (0, 1, 99, 0, 42)]
    assert dataset_tasks(folder, question, streaming=True)[57] == task(57)


def test_a_data_set_that_cannot_be_loaded_is_named(folder):
    with pytest.raises(TaskSourceError, match=r"cannot load the Hugging Face data set '.*nowhere'"):
        dataset_tasks(folder + "/nowhere", question)[0]
    with pytest.raises(TaskSourceError, match="cannot load"):
        dataset_tasks(folder, question, split="validation")[0]


@pytest.mark.skipif(not GSM8K.exists(), reason=ABSENT)
def test_public_data_is_read_split_and_free_of_duplicates():
    tasks = jsonl_tasks(GSM8K, columns("question", "answer"))
    assert tasks.count == 1319
    assert tasks.duplicates() == []
    train, held_out = tasks.split(0.2)
    assert train.count + held_out.count == 1319
    assert 200 < held_out.count < 330
