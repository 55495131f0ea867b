"""Programming languages as data: the file that code goes into, and the commands that compile and run it."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Language:
    """How code of one language is run in a sandbox.

    file: where the code goes, in the working folder. compile: the command that makes a program of it; empty where there
    is nothing to do. run: the command that runs it. packages: what to put into an image that lacks the commands, for
    people. env: variables that the commands want.

    Example::

        await run_code(box, code, language=Language("awk", "main.awk", run=("awk", "-f", "main.awk"), packages="gawk"))
    """

    name: str
    file: str
    run: tuple[str, ...]
    compile: tuple[str, ...] = ()
    packages: str = ""
    aliases: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()

    @property
    def tool(self) -> str:
        """The first program that it needs of the image."""
        return (self.compile or self.run)[0]


LANGUAGES: tuple[Language, ...] = (
    Language("python", "main.py", run=("python3", "main.py"), packages="python3", aliases=("python3", "py")),
    Language(
        "c",
        "main.c",
        compile=("gcc", "-O2", "-std=gnu17", "-o", "main.out", "main.c", "-lm"),
        run=("./main.out",),
        packages="gcc libc6-dev",
    ),
    Language(
        "cpp",
        "main.cpp",
        compile=("g++", "-O2", "-std=gnu++20", "-o", "main.out", "main.cpp"),
        run=("./main.out",),
        packages="g++",
        aliases=("c++", "cxx"),
    ),
    Language("javascript", "main.js", run=("node", "main.js"), packages="nodejs", aliases=("nodejs", "node", "js")),
    Language("bash", "main.sh", run=("bash", "main.sh"), packages="bash", aliases=("sh", "shell")),
    Language(
        "go",
        "main.go",
        compile=("go", "build", "-o", "main.out", "main.go"),
        run=("./main.out",),
        packages="golang-go",
        aliases=("golang",),
        env=(("GOCACHE", "/tmp/go-cache"), ("GOPATH", "/tmp/go"), ("GOFLAGS", "-mod=mod"), ("CGO_ENABLED", "0")),
    ),
    Language(
        "rust",
        "main.rs",
        compile=("rustc", "-O", "--edition", "2021", "-o", "main.out", "main.rs"),
        run=("./main.out",),
        packages="rustc",
        aliases=("rs",),
    ),
    Language(
        "java",
        "Main.java",
        compile=("javac", "-d", ".", "Main.java"),
        run=("java", "-cp", ".", "-XX:TieredStopAtLevel=1", "Main"),
        packages="default-jdk-headless",
    ),
    Language(
        "typescript",
        "main.ts",
        run=("tsx", "main.ts"),
        packages="nodejs npm, then `npm install -g tsx`",
        aliases=("ts",),
    ),
    Language("perl", "main.pl", run=("perl", "main.pl"), packages="perl"),
    Language("ruby", "main.rb", run=("ruby", "main.rb"), packages="ruby"),
    Language("php", "main.php", run=("php", "main.php"), packages="php-cli"),
    Language("lua", "main.lua", run=("lua", "main.lua"), packages="lua5.4"),
)
"""Those that `run_code` knows by name: Python, C, C++, JavaScript, Bash, Go, Rust, Java, TypeScript, Perl, Ruby, PHP, Lua."""


def find_language(name: str, languages: Iterable[Language] = LANGUAGES) -> Language:
    """The language of a name or another name of it; `ValueError` that lists those there are."""
    wanted = name.lower()
    for language in languages:
        if wanted == language.name or wanted in language.aliases:
            return language
    known = ", ".join(language.name for language in languages)
    raise ValueError(f"no language {name!r}; there are {known}, and whatever you describe as a `Language`")
