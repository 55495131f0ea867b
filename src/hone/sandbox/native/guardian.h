/* The guardian of a sandbox without a process namespace: what its first process leaves behind ends with it.

   It is outside of everything that confines the sandbox, so that nothing in there can signal it, and the reaper of all
   that descends from it: when it has no children any more, nothing of the sandbox is left. */
#ifndef HONE_GUARDIAN_H
#define HONE_GUARDIAN_H

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MAX_GUARDED 16384

static struct { pid_t pid, parent; } processes[MAX_GUARDED];
static pid_t stopped[MAX_GUARDED];
static int num_stopped;

static pid_t parent_of(pid_t pid)
{
    char path[32], text[512];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    int descriptor = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t size = descriptor < 0 ? -1 : read(descriptor, text, sizeof text - 1);
    if (descriptor >= 0)
        close(descriptor);
    if (size <= 0)
        return -1;
    text[size] = 0;
    const char *rest = strrchr(text, ')'); /* "PID (name) state parent ..." */
    return rest && rest[1] && rest[2] != 'Z' ? atoi(rest + 3) : -1;
}

static int is_below(pid_t pid)
{
    for (int i = 0; i < num_stopped; i++)
        if (stopped[i] == pid)
            return 1;
    return pid == getpid();
}

/* By a descriptor, and only if it still is who it was: another process may have its number meanwhile. */
static void signal_child(pid_t pid, pid_t parent, int number)
{
    int descriptor = syscall(SYS_pidfd_open, pid, 0);
    if (descriptor < 0)
        return;
    if (parent_of(pid) == parent)
        syscall(SYS_pidfd_send_signal, descriptor, number, NULL, 0);
    close(descriptor);
}

/* Stop what descends from this process and was not stopped before; how many those were. */
static int stop_new(void)
{
    int num_processes = 0, num_before = num_stopped;
    DIR *folder = opendir("/proc");
    for (struct dirent *entry; folder && (entry = readdir(folder)) && num_processes < MAX_GUARDED;) {
        pid_t pid = atoi(entry->d_name), parent = pid > 1 ? parent_of(pid) : -1;
        if (parent > 0) {
            processes[num_processes].pid = pid;
            processes[num_processes++].parent = parent;
        }
    }
    if (folder)
        closedir(folder);
    for (int changed = 1; changed;) {
        changed = 0;
        for (int i = 0; i < num_processes && num_stopped < MAX_GUARDED; i++) {
            if (is_below(processes[i].pid) || !is_below(processes[i].parent))
                continue;
            stopped[num_stopped++] = processes[i].pid;
            signal_child(processes[i].pid, processes[i].parent, SIGSTOP);
            changed = 1;
        }
    }
    return num_stopped - num_before;
}

/* Until there are no children any more: whatever descends from this process becomes its child before it ends. */
static void end_all(const sigset_t *awaited)
{
    const struct timespec moment = {0, 2000000};
    for (;;) {
        num_stopped = 0;
        while (stop_new())
            ;
        for (int i = 0; i < num_stopped; i++) {
            pid_t parent = parent_of(stopped[i]);
            if (is_below(parent))
                signal_child(stopped[i], parent, SIGKILL);
        }
        pid_t ended;
        while ((ended = waitpid(-1, NULL, WNOHANG)) > 0)
            ;
        if (ended < 0 && errno == ECHILD)
            return;
        sigtimedwait(awaited, NULL, &moment);
    }
}

/* Wait for the end of the first process, or for SIGTERM, which also comes when the spawner dies; does not return. */
static void guard_tree(pid_t first)
{
    sigset_t awaited;
    sigemptyset(&awaited);
    sigaddset(&awaited, SIGCHLD);
    sigaddset(&awaited, SIGTERM);
    sigprocmask(SIG_BLOCK, &awaited, NULL);
    prctl(PR_SET_PDEATHSIG, SIGTERM, 0, 0, 0);
    close_range(0, ~0u, 0);
    for (int is_over = 0; !is_over;) {
        pid_t ended;
        while ((ended = waitpid(-1, NULL, WNOHANG)) > 0 && ended != first)
            ;
        is_over = ended != 0 || sigwaitinfo(&awaited, NULL) == SIGTERM;
    }
    end_all(&awaited);
    _exit(0);
}

#endif
