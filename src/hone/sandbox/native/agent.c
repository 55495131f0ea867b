/* The agent: the first process of a sandbox, whatever its runtime. It starts programs with the descriptors it is given,
   reaps, and reports.

   It has no libc: one small page or two of memory each in thousands of cells, and nothing to find in them. It trusts its
   control socket and nothing else; when that closes it exits, and the kernel kills everything in the cell. */

#include <asm/unistd.h>
#include <linux/sched.h>
#include <stddef.h>
#include <stdint.h>

#include "protocol.h"

#define O_RDONLY 0
#define O_CLOEXEC 02000000
#define O_PATH 010000000
#if defined(__aarch64__)
#define O_DIRECTORY 040000
#else
#define O_DIRECTORY 0200000
#endif
#define POLLIN 1
#define SIGKILL 9
#define SIGCHLD 17
#define SIGSTOP 19
#define SIG_BLOCK 0
#define SIG_SETMASK 2
#define WNOHANG 1
#define ENOENT 2
#define EINTR 4
#define EAGAIN 11
#define EACCES 13
#define ENOTDIR 20
#define TIOCSCTTY 0x540E
#define SOL_SOCKET 1
#define SCM_RIGHTS 1
#define MSG_NOSIGNAL 0x4000
#define MSG_CMSG_CLOEXEC 0x40000000
#define PR_SET_DUMPABLE 4
#define AT_FDCWD -100

#define MAX_PROGRAMS 4096
#define MAX_STRINGS (32 << 10)
#define MAX_PROCESSES 16384

struct io { void *base; size_t size; };
struct message { void *name; int name_size; struct io *parts; size_t num_parts; void *control; size_t control_size; int flags; };
struct control { size_t size; int level, type; int descriptors[4]; };
struct usage { int64_t user[2], system[2]; int64_t peak_kilobytes, rest[13]; };
struct polled { int descriptor; short events, happened; };

struct start {
    struct request header;
    int stdio[3], cgroup;
    const char *folder;
    char **arguments, **variables;
};

static char buffer[MESSAGE_BYTES];
static char *strings[MAX_STRINGS + 2];
static struct { int pid; uint32_t identity; } programs[MAX_PROGRAMS];
static int num_programs;
static int known[MAX_PROCESSES];
static int num_known;
static char child_stack[32 << 10] __attribute__((aligned(16)));

#if defined(__x86_64__)
static long call(long number, long a, long b, long c, long d, long e)
{
    long result;
    register long r10 asm("r10") = d;
    register long r8 asm("r8") = e;
    register long r9 asm("r9") = 0;
    asm volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                 : "rcx", "r11", "memory");
    return result;
}

/* clone or clone3 with a stack: the child calls `run`, which does not return. */
static long clone_onto(long number, long a, long b, void (*run)(const struct start *), const struct start *start)
{
    long result;
    register void *function asm("r12") = run;
    register const void *argument asm("r13") = start;
    register long r10 asm("r10") = 0;
    register long r8 asm("r8") = 0;
    asm volatile("syscall\n\ttest %%rax, %%rax\n\tjnz 1f\n\txor %%ebp, %%ebp\n\tmov %%r13, %%rdi\n\tcall *%%r12\n\thlt\n1:"
                 : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(0L), "r"(r10), "r"(r8), "r"(function), "r"(argument)
                 : "rcx", "r11", "memory");
    return result;
}

asm(".globl _start\n_start:\n\txor %ebp, %ebp\n\tmov %rsp, %rdi\n\tand $-16, %rsp\n\tcall serve\n\thlt\n");
#elif defined(__aarch64__)
static long call(long number, long a, long b, long c, long d, long e)
{
    register long x8 asm("x8") = number;
    register long x0 asm("x0") = a;
    register long x1 asm("x1") = b;
    register long x2 asm("x2") = c;
    register long x3 asm("x3") = d;
    register long x4 asm("x4") = e;
    register long x5 asm("x5") = 0;
    asm volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
    return x0;
}

static long clone_onto(long number, long a, long b, void (*run)(const struct start *), const struct start *start)
{
    register long x8 asm("x8") = number;
    register long x0 asm("x0") = a;
    register long x1 asm("x1") = b;
    register long x2 asm("x2") = 0;
    register long x3 asm("x3") = 0;
    register long x4 asm("x4") = 0;
    register void *function asm("x19") = run;
    register const void *argument asm("x20") = start;
    asm volatile("svc 0\n\tcbnz x0, 1f\n\tmov x29, #0\n\tmov x0, x20\n\tblr x19\n\tbrk #0\n1:"
                 : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(function), "r"(argument) : "memory");
    return x0;
}

asm(".globl _start\n_start:\n\tmov x29, #0\n\tmov x0, sp\n\tbl serve\n\tbrk #0\n");
#else
#error "the agent knows x86_64 and aarch64"
#endif

void *memcpy(void *to, const void *from, size_t size)
{
    for (size_t i = 0; i < size; i++)
        ((char *)to)[i] = ((const char *)from)[i];
    return to;
}

void *memset(void *to, int value, size_t size)
{
    for (size_t i = 0; i < size; i++)
        ((char *)to)[i] = value;
    return to;
}

static size_t length(const char *text)
{
    size_t size = 0;
    while (text[size])
        size++;
    return size;
}

static void leave(int status)
{
    for (;;)
        call(__NR_exit_group, status, 0, 0, 0, 0);
}

static long open_path(const char *path, long flags)
{
    return call(__NR_openat, AT_FDCWD, (long)path, flags, 0, 0);
}

static void send_report(const struct report *report, const int *descriptors, int num_descriptors)
{
    struct io part = {(void *)report, sizeof *report};
    struct control control = {.size = offsetof(struct control, descriptors) + num_descriptors * sizeof(int),
                              .level = SOL_SOCKET, .type = SCM_RIGHTS};
    struct message header = {.parts = &part, .num_parts = 1};
    for (int i = 0; i < num_descriptors; i++)
        control.descriptors[i] = descriptors[i];
    if (num_descriptors) {
        header.control = &control;
        header.control_size = control.size;
    }
    long sent;
    while ((sent = call(__NR_sendmsg, CONTROL, (long)&header, MSG_NOSIGNAL, 0, 0)) == -EINTR)
        ;
    if (sent < 0)
        leave(1);
}

/* The environment's PATH, or a usual one. */
static const char *search_path(char **variables)
{
    for (; *variables; variables++) {
        const char *text = *variables;
        if (text[0] == 'P' && text[1] == 'A' && text[2] == 'T' && text[3] == 'H' && text[4] == '=')
            return text + 5;
    }
    return "/usr/local/bin:/usr/bin:/bin";
}

/* Become the program; what stood in the way otherwise. */
static long execute(const char *name, char **arguments, char **variables)
{
    for (const char *c = name; *c; c++)
        if (*c == '/')
            return call(__NR_execve, (long)name, (long)arguments, (long)variables, 0, 0);
    long problem = -ENOENT;
    size_t name_size = length(name);
    for (const char *folder = search_path(variables); *folder;) {
        size_t size = 0;
        while (folder[size] && folder[size] != ':')
            size++;
        char path[4096];
        if (size && size + name_size + 2 <= sizeof path) {
            memcpy(path, folder, size);
            path[size] = '/';
            memcpy(path + size + 1, name, name_size + 1);
            long result = call(__NR_execve, (long)path, (long)arguments, (long)variables, 0, 0);
            if (result != -ENOENT && result != -ENOTDIR)
                problem = result;
            if (problem != -ENOENT && problem != -EACCES)
                return problem;
        }
        folder += folder[size] ? size + 1 : size;
    }
    return problem;
}

static void complain(const char *what, const char *why)
{
    call(__NR_write, 2, (long)what, length(what), 0, 0);
    call(__NR_write, 2, (long)why, length(why), 0, 0);
}

/* A Landlock domain within the agent's, out of which no signal gets. */
static int set_apart(void)
{
    uint64_t attributes[3] = {0, 0, 2 /* LANDLOCK_SCOPE_SIGNAL */};
    long ruleset = call(__NR_landlock_create_ruleset, (long)attributes, sizeof attributes, 0, 0, 0);
    if (ruleset < 0 || call(__NR_landlock_restrict_self, ruleset, 0, 0, 0, 0) < 0)
        return -1;
    return call(__NR_close, ruleset, 0, 0, 0, 0);
}

static void run(const struct start *start)
{
    uint64_t no_signals = 0;
    call(__NR_setsid, 0, 0, 0, 0, 0);
    if (start->header.flags & FLAG_JOINS && start->cgroup >= 0 &&
        call(__NR_write, start->cgroup, (long)"0", 1, 0, 0) != 1)
        leave(126);
    if (start->header.flags & FLAG_APART && set_apart() < 0)
        leave(126);
    for (int i = 0; i < 3; i++)
        call(__NR_dup3, start->stdio[i], i, 0, 0, 0);
    if (start->header.flags & FLAG_TERMINAL)
        call(__NR_ioctl, 0, TIOCSCTTY, 0, 0, 0);
    call(__NR_rt_sigprocmask, SIG_SETMASK, (long)&no_signals, 0, 8, 0);
    if (call(__NR_chdir, (long)start->folder, 0, 0, 0, 0) < 0) {
        complain(start->folder, ": no such folder\n");
        leave(127);
    }
    long problem = execute(start->arguments[0], start->arguments, start->variables);
    complain(start->arguments[0], problem == -ENOENT   ? ": no such program\n"
                                  : problem == -EACCES ? ": not a program that may be run\n"
                                                       : ": cannot be run\n");
    leave(problem == -ENOENT ? 127 : 126);
}

static void report_end(uint32_t identity, int status, int error, const struct usage *usage)
{
    struct report report = {.kind = REPORT_ENDED, .identity = identity, .status = status, .error = error};
    if (usage) {
        report.user_microseconds = usage->user[0] * 1000000 + usage->user[1];
        report.system_microseconds = usage->system[0] * 1000000 + usage->system[1];
        report.peak_kilobytes = usage->peak_kilobytes;
    }
    send_report(&report, NULL, 0);
}

/* Point `strings` at the request's arguments and variables; whether they are as many as it says. */
static int find_strings(struct start *start, const char *end)
{
    char *position = buffer + sizeof start->header;
    uint32_t num_strings = start->header.num_arguments + start->header.num_variables;
    if (position >= end || end[-1] || !start->header.num_arguments || num_strings > MAX_STRINGS)
        return 0;
    start->folder = position;
    char **next = strings;
    start->arguments = strings;
    for (uint32_t i = 0; i < num_strings; i++) {
        position += length(position) + 1;
        if (position >= end)
            return 0;
        if (i == start->header.num_arguments)
            *next++ = NULL;
        if (i >= start->header.num_arguments && start->variables == NULL)
            start->variables = next;
        *next++ = position;
    }
    if (start->variables == NULL) {
        *next++ = NULL;
        start->variables = next;
    }
    *next = NULL;
    return 1;
}

static long start_program(const struct start *start)
{
    struct clone_args arguments = {
        .flags = CLONE_VM | CLONE_VFORK | CLONE_INTO_CGROUP,
        .exit_signal = SIGCHLD,
        .stack = (uint64_t)child_stack,
        .stack_size = sizeof child_stack,
        .cgroup = start->cgroup,
    };
    if (start->cgroup >= 0 && !(start->header.flags & FLAG_JOINS))
        return clone_onto(__NR_clone3, (long)&arguments, sizeof arguments, run, start);
    return clone_onto(__NR_clone, CLONE_VM | CLONE_VFORK | SIGCHLD, (long)(child_stack + sizeof child_stack), run, start);
}

static void begin(struct start *start, const char *end)
{
    long pid = -EAGAIN;
    if (num_programs < MAX_PROGRAMS && find_strings(start, end))
        pid = start_program(start);
    for (int i = 0; i < 3; i++)
        call(__NR_close, start->stdio[i], 0, 0, 0, 0);
    if (start->cgroup >= 0)
        call(__NR_close, start->cgroup, 0, 0, 0, 0);
    if (pid < 0) {
        report_end(start->header.identity, 0, -pid, NULL);
        return;
    }
    programs[num_programs].pid = pid;
    programs[num_programs++].identity = start->header.identity;
}

static int pid_of(uint32_t identity)
{
    for (int i = 0; i < num_programs; i++)
        if (programs[i].identity == identity)
            return programs[i].pid;
    return 0;
}

static void reap(void)
{
    struct usage usage;
    int status;
    long pid;
    while ((pid = call(__NR_wait4, -1, (long)&status, WNOHANG, (long)&usage, 0)) > 0) {
        for (int i = 0; i < num_programs; i++) {
            if (programs[i].pid == pid) {
                report_end(programs[i].identity, status, 0, &usage);
                programs[i] = programs[--num_programs];
                break;
            }
        }
    }
}

static long number_at(const char **text)
{
    long value = 0;
    while (**text == ' ')
        (*text)++;
    while (**text >= '0' && **text <= '9')
        value = value * 10 + *(*text)++ - '0';
    return value;
}

/* Parent and session of a process, from /proc/PID/stat: "PID (name) state parent group session ..." */
static int look_up(const char *name, int *parent, int *session)
{
    char path[32] = "/proc/", text[512];
    size_t size = length(name);
    if (size > 10)
        return 0;
    memcpy(path + 6, name, size);
    memcpy(path + 6 + size, "/stat", 6);
    long descriptor = open_path(path, O_RDONLY | O_CLOEXEC);
    if (descriptor < 0)
        return 0;
    long got = call(__NR_read, descriptor, (long)text, sizeof text - 1, 0, 0);
    call(__NR_close, descriptor, 0, 0, 0, 0);
    if (got <= 0)
        return 0;
    text[got] = 0;
    const char *rest = text + got;
    while (rest > text && *rest != ')')
        rest--;
    if (rest[0] != ')' || rest[1] != ' ' || rest[2] == 'Z' || rest[2] == 'X')
        return 0;
    rest += 3;
    *parent = number_at(&rest);
    number_at(&rest);
    *session = number_at(&rest);
    return 1;
}

static int is_known(int pid)
{
    for (int i = 0; i < num_known; i++)
        if (known[i] == pid)
            return 1;
    return 0;
}

/* Send a signal to what descends from a program or is in its session and is not known yet; to how many. */
static int signal_tree(int top, int number)
{
    static char entries[8192];
    static struct { int pid, parent, session; } all[MAX_PROCESSES];
    int num_processes = 0, num_before = num_known;
    long folder = open_path("/proc", O_RDONLY | O_DIRECTORY | O_CLOEXEC), size;
    if (folder < 0)
        return 0;
    while ((size = call(__NR_getdents64, folder, (long)entries, sizeof entries, 0, 0)) > 0) {
        for (char *entry = entries; entry < entries + size; entry += *(uint16_t *)(entry + 16)) {
            const char *name = entry + 19, *rest = name;
            int pid = number_at(&rest);
            if (pid > 1 && !*rest && num_processes < MAX_PROCESSES &&
                look_up(name, &all[num_processes].parent, &all[num_processes].session))
                all[num_processes++].pid = pid;
        }
    }
    call(__NR_close, folder, 0, 0, 0, 0);
    for (int changed = 1; changed;) {
        changed = 0;
        for (int i = 0; i < num_processes && num_known < MAX_PROCESSES; i++) {
            int pid = all[i].pid;
            if ((pid == top || all[i].session == top || is_known(all[i].parent)) && !is_known(pid)) {
                known[num_known++] = pid;
                call(__NR_kill, pid, number, 0, 0, 0);
                changed = 1;
            }
        }
    }
    return num_known - num_before;
}

/* Stop everything below a program until nothing new appears, then kill it. */
static void kill_tree(int top)
{
    num_known = 0;
    while (signal_tree(top, SIGSTOP))
        ;
    for (int i = 0; i < num_known; i++)
        call(__NR_kill, known[i], SIGKILL, 0, 0, 0);
    call(__NR_kill, -top, SIGKILL, 0, 0, 0); /* where there is no /proc to look into */
}

static void obey(const struct request *request, const char *end, const int *descriptors, int num_descriptors)
{
    struct start start = {.header = *request, .cgroup = num_descriptors == 4 ? descriptors[3] : -1};
    int pid;
    switch (request->kind) {
    case REQUEST_START:
        if (num_descriptors < 3)
            leave(1);
        memcpy(start.stdio, descriptors, sizeof start.stdio);
        begin(&start, end);
        break;
    case REQUEST_SIGNAL:
        if ((pid = pid_of(request->identity)))
            call(__NR_kill, -pid, request->flags, 0, 0, 0);
        break;
    case REQUEST_KILL_TREE:
        if ((pid = pid_of(request->identity)))
            kill_tree(pid);
        break;
    default:
        leave(1);
    }
}

static void receive(void)
{
    struct io part = {buffer, sizeof buffer};
    struct control control = {0};
    struct message header = {.parts = &part, .num_parts = 1, .control = &control, .control_size = sizeof control};
    long size = call(__NR_recvmsg, CONTROL, (long)&header, MSG_CMSG_CLOEXEC, 0, 0);
    if (size == -EINTR || size == -EAGAIN)
        return;
    struct request request;
    if (size < (long)sizeof request)
        leave(0);
    memcpy(&request, buffer, sizeof request);
    int num_descriptors = 0;
    if (header.control_size >= offsetof(struct control, descriptors) && control.type == SCM_RIGHTS)
        num_descriptors = (control.size - offsetof(struct control, descriptors)) / sizeof(int);
    obey(&request, buffer + size, control.descriptors, num_descriptors);
}

/* A control socket by its path, where it cannot be inherited. */
static void connect_to(const char *path)
{
    struct { uint16_t family; char path[108]; } address = {.family = 1 /* AF_UNIX */};
    size_t size = length(path) + 1;
    long made = call(__NR_socket, 1, 5 /* SOCK_SEQPACKET */, 0, 0, 0);
    if (made < 0 || size > sizeof address.path)
        leave(1);
    memcpy(address.path, path, size);
    if (call(__NR_connect, made, (long)&address, sizeof address.family + size, 0, 0) < 0)
        leave(1);
    if (made != CONTROL && call(__NR_dup3, made, CONTROL, 0, 0, 0) < 0)
        leave(1);
}

/* stack: the number of arguments, the arguments; the first one, if there is one, is the path of the control socket. */
__attribute__((used)) void serve(const long *stack)
{
    int is_connected = stack[0] > 1;
    uint64_t children = 1ULL << (SIGCHLD - 1);
    char taken[128];
    call(__NR_close_range, LAYER + 1, ~0U, 0, 0, 0); /* what another runtime may have left open */
    if (is_connected)
        connect_to((const char *)stack[2]);
    /* The copy of the layer's mount goes when the agent does: its end in the node would keep the node waiting. */
    int has_layer = call(__NR_fcntl, LAYER, 2 /* F_SETFD */, 1 /* FD_CLOEXEC */, 0, 0) == 0;
    call(__NR_prctl, PR_SET_DUMPABLE, 0, 0, 0, 0);
    call(__NR_rt_sigprocmask, SIG_BLOCK, (long)&children, 0, 8, 0);
    struct polled polled[2] = {{CONTROL, POLLIN, 0}, {call(__NR_signalfd4, -1, (long)&children, 8, O_CLOEXEC, 0), POLLIN, 0}};
    call(__NR_fcntl, CONTROL, 2, 1, 0, 0);
    int descriptors[2] = {open_path("/", O_PATH | O_DIRECTORY | O_CLOEXEC)};
    if (has_layer)
        descriptors[1] = call(__NR_openat, LAYER, (long)".", O_PATH | O_DIRECTORY | O_CLOEXEC, 0, 0);
    struct report ready = {.kind = REPORT_READY};
    send_report(&ready, descriptors, is_connected ? 0 : 1 + has_layer);
    for (int i = 0; i < 1 + has_layer; i++)
        call(__NR_close, descriptors[i], 0, 0, 0, 0);
    for (;;) {
        call(__NR_ppoll, (long)polled, 2, 0, 0, 0);
        if (polled[1].happened) {
            call(__NR_read, polled[1].descriptor, (long)taken, sizeof taken, 0, 0);
            reap();
        }
        if (polled[0].happened)
            receive();
    }
}
