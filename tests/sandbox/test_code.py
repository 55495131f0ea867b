"""Code of every language that this machine has runs in a sandbox, and what goes wrong is told apart."""

import shutil

import pytest

from hone.sandbox.client import Language, Outcome, Sandbox, SandboxError, ToolchainMissing, embedded_node, run_code
from hone.sandbox.languages import LANGUAGES, find_language

ECHO = {
    "python": "import sys\nprint(sum(map(int, sys.stdin.read().split())), open('given').read())",
    "c": """
        #include <stdio.h>
        int main() { int a, b; char text[9] = {0}; scanf("%d %d", &a, &b);
        fread(text, 1, 8, fopen("given", "r")); printf("%d %s\\n", a + b, text); }""",
    "cpp": """
        #include <bits/stdc++.h>
        int main() { int a, b; std::cin >> a >> b; std::string text; std::ifstream("given") >> text;
        std::cout << a + b << " " << text << std::endl; }""",
    "javascript": """
        const fs = require('fs'); const numbers = fs.readFileSync(0, 'utf8').split(' ').map(Number);
        console.log(numbers[0] + numbers[1], fs.readFileSync('given', 'utf8'));""",
    "bash": 'read a b; echo "$((a + b)) $(cat given)"',
    "go": """
        package main
        import ("fmt"; "os")
        func main() { var a, b int; fmt.Scan(&a, &b); text, _ := os.ReadFile("given"); fmt.Println(a + b, string(text)) }""",
    "rust": """
        fn main() { let mut line = String::new(); std::io::stdin().read_line(&mut line).unwrap();
        let sum: i32 = line.split_whitespace().map(|word| word.parse::<i32>().unwrap()).sum();
        println!("{} {}", sum, std::fs::read_to_string("given").unwrap()); }""",
    "java": """
        import java.nio.file.*; import java.util.*;
        public class Main { public static void main(String[] words) throws Exception {
        Scanner in = new Scanner(System.in); int sum = in.nextInt() + in.nextInt();
        System.out.println(sum + " " + new String(Files.readAllBytes(Path.of("given")))); } }""",
    "typescript": """
        import * as fs from 'fs'; const numbers: number[] = fs.readFileSync(0, 'utf8').split(' ').map(Number);
        console.log(numbers[0] + numbers[1], fs.readFileSync('given', 'utf8'));""",
    "perl": 'my ($a, $b) = split " ", <STDIN>; open F, "given"; print $a + $b, " ", <F>, "\\n";',
    "ruby": "puts \"#{STDIN.read.split.map(&:to_i).sum} #{File.read('given')}\"",
    "php": "<?php echo array_sum(explode(' ', fgets(STDIN))), ' ', file_get_contents('given'), \"\\n\";",
    "lua": 'local a, b = io.read("n", "n"); print(a + b, io.open("given"):read("a"))',
}
"""A program of each language: the sum of two numbers of its input, and what is in a file."""


@pytest.fixture
async def box():
    # Where no cgroup counts memory, the limit is one of address space, of which Java takes a lot.
    sandbox = Sandbox(memory_mb=16384, disk_mb=128, max_processes=128)
    try:
        await sandbox.open()
        await sandbox.ready()
    except SandboxError as error:
        await sandbox.close()
        pytest.skip(str(error))
    yield sandbox
    await sandbox.close()
    assert (await embedded_node()).statistics()["sandbox/leases"] == 0


def has(language: str) -> bool:
    found = shutil.which(find_language(language).tool, path="/usr/local/bin:/usr/bin:/bin")
    return found is not None or language == "python"


@pytest.mark.parametrize("language", [one.name for one in LANGUAGES])
async def test_a_program_has_its_input_and_its_files(box, language):
    if not has(language):
        pytest.skip(f"this machine has no {find_language(language).tool}")
    result = await run_code(
        box,
        ECHO[language],
        language=language,
        stdin=b"40 2",
        files={"given": b"text"},
        compile_timeout_seconds=120,
        run_timeout_seconds=60,
    )
    assert result.is_success, result
    assert result.ran.stdout.split() == ["42", "text"]
    assert (result.compiled is None) == (not find_language(language).compile)


async def test_what_does_not_compile_does_not_run(box):
    result = await run_code(box, "int main() { return nothing; }", language="c", compile_timeout_seconds=60)
    assert not result.is_success
    assert result.ran is None
    assert result.compiled.outcome is Outcome.EXITED
    assert "nothing" in result.compiled.stderr


async def test_a_program_that_is_late_is_a_result(box):
    result = await run_code(box, "while true; do :; done", language="bash", run_timeout_seconds=0.2)
    assert result.ran.outcome is Outcome.TIMEOUT
    assert not result.is_success


async def test_a_compiler_that_does_not_end_is_a_result(box):
    slow = Language("slow", "main.slow", compile=("sleep", "60"), run=("true",))
    result = await run_code(box, "", language=slow, compile_timeout_seconds=0.2)
    assert result.compiled.outcome is Outcome.TIMEOUT
    assert result.ran is None


async def test_a_toolchain_that_is_missing_is_told_with_what_brings_it(box):
    unknown = Language("cobol", "main.cob", compile=("cobc-is-not-here", "-x"), run=("./main",), packages="gnucobol")
    with pytest.raises(ToolchainMissing, match="cobc-is-not-here, which this") as failure:
        await run_code(box, "DISPLAY 'HELLO'.", language=unknown)
    assert failure.value.outcome.is_infra
    assert failure.value.program == "cobc-is-not-here"


async def test_code_cannot_pass_for_a_missing_toolchain(box):
    code = "echo 'bash: no such program' >&2; exit 127"
    assert (await run_code(box, code, language="bash")).ran.exit_code == 127


async def test_a_language_of_ones_own_is_a_line(box):
    lines = Language("lines", "main.txt", run=("wc", "-l", "main.txt"))
    assert (await run_code(box, "a\nb\n", language=lines)).ran.stdout.split()[0] == "2"


@pytest.mark.parametrize("name", ["Python", "py", "C++", "nodejs", "sh", "golang", "ts"])
def test_languages_have_other_names(name):
    assert find_language(name) in LANGUAGES


def test_an_unknown_language_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="no language 'klingon'; there are python, c, cpp"):
        find_language("klingon")


def test_no_name_means_two_languages():
    names = [name for one in LANGUAGES for name in (one.name, *one.aliases)]
    assert len(names) == len(set(names))
