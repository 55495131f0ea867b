"""Starts commands as they come, a line of JSON for each time, and says how long they took until all had ended."""

import json
import subprocess
import sys
import time

LIMIT_SECONDS = 60.0


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


def answer(commands: list[list[str]]) -> dict[str, float | str]:
    """Seconds, or what the first that fails says."""
    started = time.perf_counter()
    # What is left running keeps stdout, so nobody may wait for its end; what it complains of is little.
    running = [
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for command in commands
    ]
    codes = []
    for process in running:
        try:
            codes.append(process.wait(max(0.0, started + LIMIT_SECONDS - time.perf_counter())))
        except subprocess.TimeoutExpired:
            process.kill()
            codes.append(process.wait())
    seconds = time.perf_counter() - started
    for command, code in zip(commands, codes, strict=True):
        if code:
            return {"problem": f"{' '.join(command)[:200]} fails with {code}: {complaint(command)}"}
    return {"seconds": seconds}


def complaint(command: list[str]) -> str:
    """What a command that fails has to say, run once more."""
    try:
        finished = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        return "hangs"
    return finished.stderr.strip()[-200:]


if __name__ == "__main__":
    main()
