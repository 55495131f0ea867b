/* The steps by which a process gives up what programs of a cell shall not have. */
#ifndef HONE_CONFINE_H
#define HONE_CONFINE_H

#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/landlock.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "protocol.h"

struct bpf {
    uint16_t num_instructions;
    const void *instructions;
};

static int limit(const struct operation *operation)
{
    struct rlimit wanted = {operation->b, operation->b}, present;
    if (getrlimit(operation->a, &present))
        return -1;
    if (wanted.rlim_max > present.rlim_max)
        wanted.rlim_cur = wanted.rlim_max = present.rlim_max;
    return setrlimit(operation->a, &wanted);
}

static int drop_powers(void)
{
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct none[2] = {{0}};
    for (int capability = 0; prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0; capability++)
        ;
    if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0))
        return -1;
    return syscall(SYS_capset, &header, none);
}

static int filter(const struct operation *operation, const char *data)
{
    struct bpf program = {operation->size / 8, data};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        return -1;
    return syscall(SYS_seccomp, 1 /* SECCOMP_SET_MODE_FILTER */, 0, &program);
}

static int restrict_by_landlock(const struct operation *operation, const char *data)
{
    uint64_t attributes[3];
    memcpy(attributes, data, sizeof attributes);
    int ruleset = syscall(SYS_landlock_create_ruleset, attributes, operation->a, 0);
    if (ruleset < 0)
        return -1;
    const char *rule = data + sizeof attributes, *end = data + operation->size;
    while (rule < end) {
        uint64_t header[2];
        memcpy(header, rule, sizeof header);
        struct landlock_path_beneath_attr beneath = {.allowed_access = header[0]};
        beneath.parent_fd = open(rule + sizeof header, O_PATH | O_CLOEXEC);
        if (beneath.parent_fd < 0 ||
            syscall(SYS_landlock_add_rule, ruleset, LANDLOCK_RULE_PATH_BENEATH, &beneath, 0))
            return -1;
        close(beneath.parent_fd);
        rule += sizeof header + header[1];
    }
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || syscall(SYS_landlock_restrict_self, ruleset, 0))
        return -1;
    return close(ruleset);
}

/* Carry out a step if it is one of these; 0 when it is done. */
static int confine(const struct operation *operation, const char *data)
{
    switch (operation->code) {
    case OPERATION_LIMIT:
        return limit(operation);
    case OPERATION_FILTER:
        return filter(operation, data);
    case OPERATION_DROP_POWERS:
        return drop_powers();
    case OPERATION_CORES:
        return syscall(SYS_sched_setaffinity, 0, operation->size, data) < 0 ? -1 : 0;
    case OPERATION_LANDLOCK:
        return restrict_by_landlock(operation, data);
    default:
        errno = ENOSYS;
        return -1;
    }
}

#endif
