/* A warm Python while it has nothing to run: the zygote's fork into a cell, and its wait there for snippets and sessions.

   A library that the zygote calls. Running Python writes to a page wherever it counts a reference, so a process that waits
   in here shares its memory with the zygote, and a fork of it has next to nothing to copy. `serve` returns in the processes
   that are to run something, and when the node hangs up. Until it runs something, nothing in the cell can look into a
   process: it is not dumpable. */

#define _GNU_SOURCE
#include <dirent.h>
#include <linux/sched.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/signalfd.h>
#include <sys/time.h>
#include <sys/wait.h>

#include "confine.h"
#include "messages.h"
#include "protocol.h"

#ifndef CLONE_INTO_CGROUP
#define CLONE_INTO_CGROUP 0x200000000ULL
#endif
#define MAX_PROGRAMS 4096
#define MAX_PROCESSES 16384
#define ANSWER_SECONDS 10 /* for an idle session to fork itself */
#define LINE 3            /* where a session finds its socket to this process */

/* node -> zygote, with a pidfd of the cell, the socket to listen on, the cgroup to be born in, and `tasks` files of v1. */
struct order {
    uint32_t has_ranges, has_cgroup, num_tasks;
};

/* What is to be run: the node's request as it came, and whether there is a LINE. Its streams and folder are in place. */
struct program {
    const char *message;
    int64_t size;
    int32_t is_session;
};

static char message[MESSAGE_BYTES];
static int descriptors[MAX_DESCRIPTORS], num_descriptors;
static struct {
    uint32_t identity;
    pid_t pid;
    int line; /* of a session: who can be asked to fork; -1: of none */
} programs[MAX_PROGRAMS];
static int num_programs;
static struct sigaction interrupt; /* what Python does about SIGINT */

static void close_taken(void)
{
    for (int i = 0; i < num_descriptors; i++)
        close(descriptors[i]);
}

/* A fork; clone3 is only there for cells with cgroups. */
static pid_t fork_into(int cgroup)
{
    struct clone_args arguments = {.flags = CLONE_INTO_CGROUP, .exit_signal = SIGCHLD, .cgroup = cgroup};
    if (cgroup < 0)
        return syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
    return syscall(SYS_clone3, &arguments, sizeof arguments);
}

/* A fork whose parent is gone at once, which makes the first process of its namespace its parent. That one reaps it, and
   the namespace can end whatever becomes of the zygote. */
static pid_t fork_and_leave(int cgroup)
{
    volatile pid_t pid = -1;
    volatile int error = 0;
    pid_t between = vfork();
    if (between == 0) {
        pid = fork_into(cgroup);
        if (pid == 0)
            return 0;
        error = errno;
        _exit(0);
    }
    if (between > 0)
        errno = error;
    return between < 0 ? -1 : pid;
}

static int report(int control, uint32_t kind, uint32_t identity, int status, int error, const struct rusage *usage)
{
    struct report told = {.kind = kind, .identity = identity, .status = status, .error = error};
    if (usage) {
        told.user_microseconds = usage->ru_utime.tv_sec * 1000000 + usage->ru_utime.tv_usec;
        told.system_microseconds = usage->ru_stime.tv_sec * 1000000 + usage->ru_stime.tv_usec;
        told.peak_kilobytes = usage->ru_maxrss;
    }
    return send(control, &told, sizeof told, MSG_NOSIGNAL) == sizeof told ? 0 : -1;
}

/* In the cell, where there is nothing to live for once the node has hung up. */
static void report_end(uint32_t identity, int status, int error, const struct rusage *usage)
{
    if (report(CONTROL, REPORT_ENDED, identity, status, error, usage))
        _exit(0);
}

static int take_settings(const char *position, const char *end, int control)
{
    setsid();
    if (control != CONTROL && dup2(control, CONTROL) < 0)
        return -1;
    descriptors[1] = CONTROL; /* where a failure is told from here on */
    close_range(CONTROL + 1, ~0u, 0);
    fcntl(CONTROL, F_SETFD, FD_CLOEXEC);
    syscall(SYS_setgroups, 0, NULL); /* refused, and needless, where only one id is mapped */
    if (syscall(SYS_setresgid, 0, 0, 0) || syscall(SYS_setresuid, 0, 0, 0) || prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) ||
        prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0))
        return -1;
    while (position < end) {
        struct operation operation;
        memcpy(&operation, position, sizeof operation);
        position += sizeof operation;
        if (confine(&operation, position))
            return -1;
        position += (operation.size + 7) & ~7u;
    }
    return 0;
}

/* Fork into a cell. Returns 0 in the child, which is in there and confined, and -1 where the fork fails. */
static pid_t enter(const struct order *order, const char *end, int own_pids)
{
    int pidfd = descriptors[0], control = descriptors[1], cgroup = order->has_cgroup ? descriptors[2] : -1;
    int others = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWNET;
    pid_t pid = -1;
    if (order->has_ranges) { /* root may have its children born in the cell's process namespace, which saves a fork */
        if (setns(pidfd, CLONE_NEWPID))
            return -1;
        pid = fork_and_leave(cgroup);
        int error = errno;
        if (pid && setns(own_pids, CLONE_NEWPID))
            _exit(1);
        errno = error;
    } else {
        pid = fork_into(-1);
    }
    if (pid)
        return pid;
    const int *tasks = descriptors + 2 + order->has_cgroup;
    int result = 0;
    for (uint32_t i = 0; i < order->num_tasks; i++)
        if (write(tasks[i], "0", 1) != 1)
            result = -1;
    result = result || setns(pidfd, others | (order->has_ranges ? 0 : CLONE_NEWPID));
    if (!result && !order->has_ranges && (pid = fork_and_leave(cgroup)))
        result = pid < 0;
    if (pid > 0)
        _exit(0);
    if (!result && !take_settings((const char *)(order + 1), end, control))
        return 0;
    report(descriptors[1], REPORT_FAILED, 0, 0, errno, NULL);
    _exit(1);
}

/* In the process that is to run something: take its streams and folder; nothing of the waiting process's is left. */
static void settle(int line, const char *folder)
{
    sigset_t none;
    signal(SIGTERM, SIG_DFL);
    sigaction(SIGINT, &interrupt, NULL);
    setsid();
    for (int i = 0; i < 3; i++)
        dup2(descriptors[i], i);
    if (line >= 0 && line != LINE)
        dup2(line, LINE);
    close_range(line >= 0 ? LINE + 1 : LINE, ~0u, 0);
    if (line >= 0)
        fcntl(LINE, F_SETFD, FD_CLOEXEC);
    prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    if (chdir(folder)) {
        dprintf(2, "%s: %s\n", folder, strerror(errno));
        _exit(127);
    }
}

static int find(uint32_t identity)
{
    for (int i = 0; i < num_programs; i++)
        if (programs[i].identity == identity)
            return i;
    return -1;
}

/* A socket pair for a session to be asked to fork itself; neither side of it waits for ever. */
static int open_line(int ends[2])
{
    struct timeval limit = {.tv_sec = ANSWER_SECONDS};
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends))
        return -1;
    setsockopt(ends[0], SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    setsockopt(ends[0], SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    return 0;
}

/* Whether a process is a child of this one, and none that is known. */
static int is_new_child(pid_t pid)
{
    siginfo_t seen;
    for (int i = 0; i < num_programs; i++)
        if (programs[i].pid == pid)
            return 0;
    return pid > 0 && !waitid(P_PID, pid, &seen, WEXITED | WNOHANG | WNOWAIT);
}

static int move_into(int cgroup, pid_t pid)
{
    char text[16];
    int procs = openat(cgroup, "cgroup.procs", O_WRONLY | O_CLOEXEC);
    if (procs < 0)
        return -1;
    int size = snprintf(text, sizeof text, "%d", pid), result = write(procs, text, size) == size ? 0 : -1;
    int kept = errno;
    close(procs);
    errno = kept;
    return result;
}

/* Have an idle session fork itself; it answers with the pid, as it is here, of what is now a child of this process. It has
   run what it was sent: a folder of cgroups, from which there is a way to all other files of the machine, is not for it,
   and nothing it answers is to be believed. */
static pid_t fork_session(int session, int line)
{
    struct {
        int32_t pid, error;
    } answer = {-1, 0};
    errno = ESRCH;
    if (session < 0 || programs[session].line < 0)
        return -1;
    int passed[] = {line, descriptors[0], descriptors[1], descriptors[2]};
    if (pass(programs[session].line, "fork", 4, passed, 4) ||
        recv(programs[session].line, &answer, sizeof answer, 0) != sizeof answer)
        return -1;
    if (answer.pid <= 0 || !is_new_child(answer.pid)) {
        errno = answer.error > 0 ? answer.error : ESRCH;
        return -1;
    }
    if (num_descriptors > 3 && move_into(descriptors[3], answer.pid) && errno != ESRCH) {
        int kept = errno;
        kill(answer.pid, SIGKILL);
        errno = kept;
        return -1;
    }
    return answer.pid;
}

/* Start what a request asks for; whether this is the process that is to run it. */
static int start(const struct request *request, const char *end, struct program *program)
{
    const char *folder = message + sizeof *request, *what = folder + strnlen(folder, end - folder) + 1;
    int ends[2] = {-1, -1}, is_fork = 0;
    pid_t pid = -1;
    errno = EINVAL;
    if (num_programs == MAX_PROGRAMS)
        errno = EAGAIN;
    else if (num_descriptors >= 3 && num_descriptors <= 4 && what < end && !end[-1]) {
        is_fork = !strcmp(what, "fork");
        int has_line = is_fork || !strcmp(what, "session");
        if (!has_line || !open_line(ends)) {
            if (is_fork)
                pid = fork_session(what + 5 < end ? find(strtoul(what + 5, NULL, 10)) : -1, ends[1]);
            else
                pid = fork_into(num_descriptors > 3 ? descriptors[3] : -1);
            if (pid == 0) {
                settle(ends[1], folder);
                *program = (struct program){message, end - message, has_line};
                return 1;
            }
        }
    }
    int error = errno;
    if (ends[1] >= 0)
        close(ends[1]);
    if (pid < 0) {
        if (ends[0] >= 0)
            close(ends[0]);
        report_end(request->identity, 0, error, NULL);
        return 0;
    }
    programs[num_programs].identity = request->identity;
    programs[num_programs].pid = pid;
    programs[num_programs++].line = ends[0];
    if (is_fork)
        send(ends[0], "known", 5, MSG_NOSIGNAL);
    return 0;
}

static void reap(void)
{
    struct rusage usage;
    int status;
    pid_t pid;
    while ((pid = wait4(-1, &status, WNOHANG, &usage)) > 0) {
        for (int i = 0; i < num_programs; i++) {
            if (programs[i].pid == pid) {
                report_end(programs[i].identity, status, 0, &usage);
                if (programs[i].line >= 0)
                    close(programs[i].line);
                programs[i] = programs[--num_programs];
                break;
            }
        }
    }
}

static int session_of(const char *name)
{
    char path[300], text[512];
    int session = -1;
    snprintf(path, sizeof path, "/proc/%s/stat", name);
    int descriptor = open(path, O_RDONLY | O_CLOEXEC);
    if (descriptor < 0)
        return -1;
    ssize_t size = read(descriptor, text, sizeof text - 1);
    close(descriptor);
    text[size > 0 ? size : 0] = 0;
    const char *rest = strrchr(text, ')');
    if (rest && sscanf(rest, ") %*c %*d %*d %d", &session) != 1)
        session = -1;
    return session;
}

/* Stop what is in a session and is not known yet; how many that were. */
static int stop_session(int top, int *known, int num_known)
{
    DIR *folder = opendir("/proc");
    int num_before = num_known;
    for (struct dirent *entry; folder && (entry = readdir(folder)) && num_known < MAX_PROCESSES;) {
        int pid = atoi(entry->d_name), is_known = 0;
        if (pid <= 1 || session_of(entry->d_name) != top)
            continue;
        for (int i = 0; i < num_known; i++)
            is_known |= known[i] == pid;
        if (!is_known) {
            kill(pid, SIGSTOP);
            known[num_known++] = pid;
        }
    }
    if (folder)
        closedir(folder);
    return num_known - num_before;
}

/* Kill what is in the session of a program; all of it is stopped first, so that nothing new appears meanwhile. */
static void kill_session(int top)
{
    static int known[MAX_PROCESSES];
    int num_known = 1, num_new;
    known[0] = top; /* it may not have begun its session yet */
    kill(top, SIGSTOP);
    while ((num_new = stop_session(top, known, num_known)))
        num_known += num_new;
    for (int i = 0; i < num_known; i++)
        kill(known[i], SIGKILL);
}

/* The next request; whether this is the process that is to run it. */
static int obey(struct program *program)
{
    struct request request;
    ssize_t size = take(CONTROL, message, sizeof message, descriptors, &num_descriptors);
    if (size < (ssize_t)sizeof request)
        _exit(0);
    memcpy(&request, message, sizeof request);
    int known = find(request.identity);
    if (request.kind == REQUEST_START && start(&request, message + size, program))
        return 1;
    if (request.kind == REQUEST_SIGNAL && known >= 0 && kill(-programs[known].pid, request.flags))
        kill(programs[known].pid, request.flags);
    if (request.kind == REQUEST_KILL_TREE && known >= 0)
        kill_session(programs[known].pid);
    close_taken();
    return 0;
}

/* In the cell: returns in each process that is to run something, and nowhere else. */
static int wait_for_programs(struct program *program)
{
    struct signalfd_siginfo taken;
    sigset_t children;
    signal(SIGINT, SIG_IGN);
    signal(SIGTERM, SIG_DFL);
    signal(SIGCHLD, SIG_DFL);
    sigemptyset(&children);
    sigaddset(&children, SIGCHLD);
    sigprocmask(SIG_BLOCK, &children, NULL);
    struct pollfd watched[2] = {{CONTROL, POLLIN, 0}, {signalfd(-1, &children, SFD_CLOEXEC | SFD_NONBLOCK), POLLIN, 0}};
    report(CONTROL, REPORT_READY, 0, 0, 0, NULL);
    for (;;) {
        if (poll(watched, 2, -1) < 0)
            continue;
        if (watched[1].revents && read(watched[1].fd, &taken, sizeof taken) > 0)
            reap();
        if (watched[0].revents && obey(program))
            return 1;
    }
}

/* Fork into cells as the node asks for it on `control`, from a process that has everything imported. Returns 1 where a
   program is to be run, and 0 when the node hangs up. */
int serve(int control, struct program *program)
{
    int own_pids = open("/proc/self/ns/pid", O_RDONLY | O_CLOEXEC);
    sigaction(SIGINT, NULL, &interrupt);
    signal(SIGINT, SIG_IGN);
    signal(SIGCHLD, SIG_IGN); /* the kernel reaps; a cell is not gone before that */
    for (;;) {
        static struct order order;
        ssize_t size = take(control, message, sizeof message, descriptors, &num_descriptors);
        if (size < (ssize_t)sizeof order)
            return 0;
        memcpy(&order, message, sizeof order);
        if (num_descriptors != (int)(2 + order.has_cgroup + order.num_tasks))
            return 0;
        pid_t pid = enter((const struct order *)message, message + size, own_pids);
        if (pid == 0)
            return wait_for_programs(program);
        if (pid < 0)
            report(descriptors[1], REPORT_FAILED, 0, 0, errno, NULL);
        close_taken();
    }
}
