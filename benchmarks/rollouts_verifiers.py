"""The peer's side of rollouts.py: one measurement with verifiers, in the virtual environment that it is installed in."""

import asyncio
import json
import logging
import os
import resource
import sys

from rollouts import measured

os.environ.setdefault("OPENAI_API_KEY", "unused")


def main() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 65536), most))
    logging.disable(logging.WARNING)
    print(json.dumps(asyncio.run(rollouts(json.loads(sys.argv[-1])))))


async def rollouts(setting):
    import verifiers as vf
    from datasets import Dataset

    def exact(completion, answer):
        last = completion[-1]
        return float(answer in str(last["content"] if isinstance(last, dict) else last.content))

    class Chat(vf.MultiTurnEnv):
        async def env_response(self, messages, state, **_):
            return [{"role": "user", "content": "Are you sure? Answer again."}]

    rows = [{"question": f"What is {index} times 6?", "answer": "42"} for index in range(setting["rollouts"])]
    kind = vf.SingleTurnEnv if setting["turns"] == 1 else Chat
    limit = {} if setting["turns"] == 1 else {"max_turns": setting["turns"]}
    environment = kind(
        dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows), rubric=vf.Rubric(funcs=[exact]), **limit
    )
    client = vf.ClientConfig(api_base_url=setting["url"], api_key_var="OPENAI_API_KEY")

    async def evaluate(count, concurrent):
        return await environment.evaluate(
            client=client,
            model="mock",
            num_examples=count,
            rollouts_per_example=1,
            max_concurrent=concurrent,
            sampling_args={"max_tokens": 64},
            on_progress=lambda *_: None,  # in place of a progress bar
        )

    await evaluate(1, 1)
    async with measured(setting) as found:
        results = await evaluate(setting["rollouts"], setting["concurrent"])
    rewards = [output["reward"] for output in results["outputs"]]
    assert len(rewards) == setting["rollouts"]
    assert all(reward == 1.0 for reward in rewards), rewards[:10]
    return found


if __name__ == "__main__":
    main()
