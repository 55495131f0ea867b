/* The spawner: a small process with one thread that clones cells and lets each carry out its plan.

   It decides nothing. It is started with a clean environment, its socket and the agent's program; it ends when the
   node does, and the kernel then kills the cells it is the parent of. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <linux/sched.h>
#include <net/if.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include "confine.h"
#include "guardian.h"
#include "messages.h"
#include "protocol.h"

#ifndef SYS_mount_setattr
#define SYS_mount_setattr 442
#endif
#ifndef CLONE_INTO_CGROUP
#define CLONE_INTO_CGROUP 0x200000000ULL
#endif
#define MAX_TREES (FIRST_LAYER + MAX_LAYERS)
#define MAX_ARGUMENTS 1024

static char message[MESSAGE_BYTES];
static int descriptors[MAX_DESCRIPTORS];
static int num_descriptors;
static int trees[MAX_TREES];
static int agent;
static int networks = -1, own_network = -1;
static int keeper = -1, own_mounts = -1, given = -1;
static pid_t network_maker;

/* mount(2) and friends of libc's headers collide with the kernel's newer ones. */
static int mount_old(const char *source, const char *target, const char *type, unsigned long flags, const char *data)
{
    return syscall(SYS_mount, *source ? source : NULL, target, *type ? type : NULL, flags, *data ? data : NULL);
}

static const char *after(const char *text)
{
    return text + strlen(text) + 1;
}

static int write_all(int descriptor, const void *data, size_t size)
{
    return write(descriptor, data, size) == (ssize_t)size ? 0 : -1;
}

static int write_file(const char *path, const void *data, size_t size, mode_t mode)
{
    int flags = O_WRONLY | O_CLOEXEC | (mode ? O_CREAT | O_TRUNC | O_NOFOLLOW : 0);
    int descriptor = open(path, flags, mode);
    if (descriptor < 0)
        return -1;
    int result = size ? write_all(descriptor, data, size) : 0;
    int kept = errno;
    close(descriptor);
    errno = kept;
    return result;
}

static int take_tree(const struct operation *operation, const char *path)
{
    unsigned flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | (operation->b ? AT_RECURSIVE : 0);
    if (operation->a >= MAX_TREES) {
        errno = E2BIG;
        return -1;
    }
    trees[operation->a] = syscall(SYS_open_tree, AT_FDCWD, path, flags);
    return trees[operation->a] < 0 ? -1 : 0;
}

static int take_descriptor(const struct operation *operation)
{
    if (operation->a >= MAX_TREES || operation->b >= (uint64_t)num_descriptors) {
        errno = E2BIG;
        return -1;
    }
    trees[operation->a] = fcntl(descriptors[operation->b], F_DUPFD_CLOEXEC, 0);
    return trees[operation->a] < 0 ? -1 : 0;
}

/* See the mounts that are kept. Were they among the spawner's own, every cell would copy them when it is cloned. */
static int enter_keeper(void)
{
    if (keeper >= 0)
        return setns(keeper, CLONE_NEWNS);
    own_mounts = open("/proc/self/ns/mnt", O_RDONLY | O_CLOEXEC);
    if (own_mounts < 0 || unshare(CLONE_NEWNS))
        return -1;
    keeper = open("/proc/self/ns/mnt", O_RDONLY | O_CLOEXEC);
    return keeper < 0 ? -1 : 0;
}

static void leave_keeper(void)
{
    int kept = errno;
    if (own_mounts >= 0 && setns(own_mounts, CLONE_NEWNS))
        _exit(1);
    errno = kept;
}

static int put_tree(const struct operation *operation, const char *path)
{
    if (operation->a >= MAX_TREES) {
        errno = E2BIG;
        return -1;
    }
    struct mount_attr attributes = {.attr_set = operation->b};
    if (operation->b && syscall(SYS_mount_setattr, trees[operation->a], "", AT_EMPTY_PATH | AT_RECURSIVE, &attributes,
                                sizeof attributes))
        return -1;
    if (syscall(SYS_move_mount, trees[operation->a], "", AT_FDCWD, path, MOVE_MOUNT_F_EMPTY_PATH))
        return -1;
    return close(trees[operation->a]);
}

/* Paths lead through the new root from here on, though the old one is still there, on top of it and out of sight. */
static int pivot(const char *root)
{
    return chdir(root) || syscall(SYS_pivot_root, ".", ".") ? -1 : 0;
}

static int leave_old_root(void)
{
    return syscall(SYS_umount2, ".", 2 /* MNT_DETACH */) ? -1 : chdir("/");
}

static int is_folder(const char *path, int may_be_link)
{
    struct stat there, root;
    if (lstat(path, &there))
        return 0;
    if (S_ISLNK(there.st_mode))
        return may_be_link && !stat(path, &there) && S_ISDIR(there.st_mode) && !stat("/", &root) &&
               there.st_dev == root.st_dev;
    return S_ISDIR(there.st_mode);
}

/* Programs of an earlier cell may have left anything at the path. */
static int make_folder(const struct operation *operation, const char *path)
{
    if (!mkdir(path, operation->a))
        return 0;
    if (!operation->b || errno != EEXIST)
        return -1;
    if (operation->b == 1 || is_folder(path, operation->b == 2))
        return 0;
    return unlink(path) || mkdir(path, operation->a) ? -1 : 0;
}

static int bring_loopback_up(void)
{
    struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
    int descriptor = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (descriptor < 0)
        return -1;
    int result = ioctl(descriptor, SIOCSIFFLAGS, &request);
    close(descriptor);
    return result;
}

/* Make a network for each byte that comes. It is the slowest of namespaces and the only one that all of the machine's
   processes queue for, so it is made before it is needed, and by a process that nobody waits for. */
static void make_networks(int requests)
{
    char byte;
    prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
    while (read(requests, &byte, 1) == 1) {
        if (unshare(CLONE_NEWNET) || bring_loopback_up())
            _exit(1);
        int network = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
        if (network < 0 || pass(requests, "", 1, &network, 1))
            _exit(1);
        close(network);
    }
    _exit(0);
}

static int keep_networks(int number)
{
    int ends[2];
    own_network = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    if (own_network < 0 || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends))
        return -1;
    network_maker = fork();
    if (network_maker == 0) {
        close(ends[0]);
        make_networks(ends[1]);
    }
    close(ends[1]);
    networks = ends[0];
    while (number-- > 0)
        if (pass(networks, "", 1, NULL, 0))
            return -1;
    return network_maker < 0 ? -1 : 0;
}

/* Go into a network that is ready, and have another one made. */
static int enter_network(void)
{
    char byte;
    int network, num_taken;
    if (networks < 0 || take(networks, &byte, 1, &network, &num_taken) != 1 || num_taken != 1) {
        errno = ENONET;
        return -1;
    }
    pass(networks, "", 1, NULL, 0);
    int result = setns(network, CLONE_NEWNET);
    close(network);
    return result;
}

/* A socket that listens at a port of the loopback, or with nobody who may wait there one that is on its way to it. */
static int socket_at(uint16_t port, int is_newer, int max_waiting)
{
    struct sockaddr_in old = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct sockaddr_in6 newer = {.sin6_family = AF_INET6, .sin6_port = htons(port), .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    const struct sockaddr *address = is_newer ? (struct sockaddr *)&newer : (struct sockaddr *)&old;
    socklen_t size = is_newer ? sizeof newer : sizeof old;
    int made = socket(address->sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (made < 0)
        return -1;
    if (max_waiting ? bind(made, address, size) || listen(made, max_waiting)
                    : connect(made, address, size) && errno != EINPROGRESS) {
        int kept = errno;
        close(made);
        errno = kept;
        return -1;
    }
    return made;
}

/* A socket in the network of a process, for the node. The cell has no part in its making and never holds it. */
static int make_socket(const struct operation *operation)
{
    if (own_network < 0 || num_descriptors != 1) {
        errno = EINVAL;
        return -1;
    }
    if (setns(descriptors[0], CLONE_NEWNET))
        return -1;
    given = socket_at(operation->a, operation->a >> 16, operation->b);
    int kept = errno;
    if (setns(own_network, CLONE_NEWNET))
        _exit(1);
    errno = kept;
    return given < 0 ? -1 : 0;
}

static int take_identity(const struct operation *operation)
{
    gid_t group = operation->b;
    if (syscall(SYS_setgroups, 0, NULL) && errno != EPERM) /* EPERM: denied where only one id is mapped */
        return -1;
    return syscall(SYS_setresgid, group, group, group) || syscall(SYS_setresuid, operation->a, operation->a, operation->a)
               ? -1
               : 0;
}

static int become_agent(void)
{
    char *arguments[] = {"init", NULL}, *variables[] = {NULL};
    if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0))
        return -1;
    signal(SIGCHLD, SIG_DFL);
    signal(SIGINT, SIG_DFL);
    signal(SIGQUIT, SIG_DFL);
    signal(SIGTERM, SIG_DFL);
    signal(SIGHUP, SIG_DFL);
    if (dup2(descriptors[0], CONTROL) < 0)
        return -1;
    return syscall(SYS_execveat, agent, "", arguments, variables, AT_EMPTY_PATH);
}

/* Become the program of another runtime, which starts the agent with the control socket in its place. */
static int execute(const struct operation *operation, const char *data)
{
    size_t size = operation->size;
    char *arguments[MAX_ARGUMENTS + 1], *variables[] = {"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", NULL};
    size_t count = 0;
    for (const char *next = data; next < data + size && count < MAX_ARGUMENTS; next = after(next))
        arguments[count++] = (char *)next;
    arguments[count] = NULL;
    if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) || dup2(descriptors[operation->a], 2) < 0 ||
        dup2(descriptors[0], CONTROL) < 0)
        return -1;
    signal(SIGCHLD, SIG_DFL);
    signal(SIGINT, SIG_DFL);
    signal(SIGQUIT, SIG_DFL);
    return execve(arguments[0], arguments, variables);
}

static int put_data(const struct operation *operation, const char *data)
{
    int content = syscall(SYS_memfd_create, "data", 0);
    if (content < 0 || write_all(content, data, operation->size) || lseek(content, 0, SEEK_SET))
        return -1;
    if (dup2(content, operation->a) < 0)
        return -1;
    return close(content);
}

/* The child goes on with the plan; this process stays, and ends what the child leaves behind. */
static int guard(void)
{
    signal(SIGCHLD, SIG_DFL);
    if (prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
        return -1;
    pid_t child = fork();
    if (child > 0)
        guard_tree(child);
    return child;
}

static int carry_out(const struct operation *operation, const char *data)
{
    switch (operation->code) {
    case OPERATION_MOUNT: {
        const char *target = after(data), *type = after(target), *options = after(type);
        return mount_old(data, target, type, operation->a, options);
    }
    case OPERATION_MAKE_FOLDER:
        return make_folder(operation, data);
    case OPERATION_LINK:
        return symlink(data, after(data));
    case OPERATION_WRITE: {
        const char *content = after(data);
        return write_file(data, content, operation->size - (content - data), operation->a);
    }
    case OPERATION_TAKE_TREE:
        return take_tree(operation, data);
    case OPERATION_PUT_TREE:
        return put_tree(operation, data);
    case OPERATION_KEEP: {
        int tree = syscall(SYS_open_tree, AT_FDCWD, data, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
        return tree < 0 || dup3(tree, LAYER, 0) < 0 ? -1 : close(tree);
    }
    case OPERATION_KEEPER:
        return enter_keeper();
    case OPERATION_TAKE_DESCRIPTOR:
        return take_descriptor(operation);
    case OPERATION_GIVE:
        return (given = open(data, O_PATH | O_DIRECTORY | O_CLOEXEC)) < 0 ? -1 : 0;
    case OPERATION_SOCKET:
        return make_socket(operation);
    case OPERATION_PIVOT:
        return pivot(data);
    case OPERATION_LEAVE:
        return leave_old_root();
    case OPERATION_UNMOUNT:
        return syscall(SYS_umount2, data, 2 /* MNT_DETACH */);
    case OPERATION_HOSTNAME:
        return sethostname(data, operation->size);
    case OPERATION_NETWORKS:
        return keep_networks(operation->a);
    case OPERATION_IDENTITY:
        return take_identity(operation);
    case OPERATION_JOIN:
        return write_all(descriptors[operation->a], "0", 1);
    case OPERATION_UNSHARE:
        return unshare(operation->a);
    case OPERATION_BECOME_AGENT:
        return become_agent();
    case OPERATION_EXECUTE:
        return execute(operation, data);
    case OPERATION_DATA:
        return put_data(operation, data);
    case OPERATION_GUARD:
        return guard();
    default:
        return confine(operation, data);
    }
}

/* Carry out the operations in turn; returns only where one fails, with its number. */
static uint32_t carry_out_all(const char *position, uint32_t num_operations)
{
    for (uint32_t step = 0; step < num_operations; step++) {
        struct operation operation;
        memcpy(&operation, position, sizeof operation);
        position += sizeof operation;
        if (carry_out(&operation, position) < 0)
            return step;
        position += (operation.size + 7) & ~7u;
    }
    errno = 0;
    return num_operations;
}

/* What the clone does: it waits until it has its ids, and layers that belong to them, and obeys. */
static void be_born(const struct spawn *order, const char *operations, int gate)
{
    struct report failure = {.kind = REPORT_FAILED};
    char byte;
    int num_layers;
    if (gate >= 0 && take(gate, &byte, 1, trees + FIRST_LAYER, &num_layers) != 1)
        _exit(1);
    failure.identity = carry_out_all(operations, order->num_operations);
    failure.error = errno;
    send(descriptors[0], &failure, sizeof failure, MSG_NOSIGNAL);
    _exit(1);
}

static int map_ids(pid_t pid, const struct spawn *order, const char *maps)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/uid_map", pid);
    if (write_file(path, maps, order->uid_map_bytes, 0))
        return -1;
    if (geteuid()) { /* as the kernel wants it of who has no powers over groups */
        snprintf(path, sizeof path, "/proc/%d/setgroups", pid);
        if (write_file(path, "deny", 4, 0))
            return -1;
    }
    snprintf(path, sizeof path, "/proc/%d/gid_map", pid);
    return write_file(path, maps + order->uid_map_bytes, order->gid_map_bytes, 0);
}

/* A copy of a layer, in which files of root belong to the root of a cell where there are ids for that; or -1. */
static int copy_layer(const char *path, const struct mount_attr *attributes)
{
    int layer = syscall(SYS_open_tree, AT_FDCWD, path, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
    if (layer >= 0 && attributes->attr_set &&
        syscall(SYS_mount_setattr, layer, "", AT_EMPTY_PATH, attributes, sizeof *attributes)) {
        int kept = errno;
        close(layer);
        errno = kept;
        return -1;
    }
    return layer;
}

/* Copies of all layers; how many, with errno saying why they are not more. */
static uint32_t copy_layers(pid_t pid, const struct spawn *order, const char *path, int *layers)
{
    char name[64];
    snprintf(name, sizeof name, "/proc/%d/ns/user", pid);
    struct mount_attr attributes = {.attr_set = order->maps_layers ? MOUNT_ATTR_IDMAP : 0,
                                    .userns_fd = open(name, O_RDONLY | O_CLOEXEC)};
    uint32_t i = 0;
    int is_in_keeper = 0;
    errno = 0;
    for (; i < order->num_layers && i < MAX_LAYERS; i++, path = after(path)) {
        if ((*path != '/') != is_in_keeper) {
            if (is_in_keeper)
                leave_keeper();
            else if (enter_keeper())
                break;
            is_in_keeper = !is_in_keeper;
        }
        if ((layers[i] = copy_layer(path, &attributes)) < 0)
            break;
        errno = 0;
    }
    if (is_in_keeper)
        leave_keeper();
    int kept = errno;
    close(attributes.userns_fd);
    errno = i < order->num_layers && !kept ? E2BIG : kept;
    return i;
}

/* Give a clone its ids and its layers, and let it go on. */
static int release(pid_t pid, const struct spawn *order, const char *rest, int gate)
{
    int layers[MAX_LAYERS];
    if (order->uid_map_bytes && map_ids(pid, order, rest))
        return -1;
    int num_layers = copy_layers(pid, order, rest + order->uid_map_bytes + order->gid_map_bytes, layers);
    int error = errno;
    if (!error && pass(gate, "", 1, layers, num_layers))
        error = errno;
    for (int i = 0; i < num_layers; i++)
        close(layers[i]);
    errno = error;
    return error ? -1 : 0;
}

static int spawn(const struct spawn *order, const char *rest, pid_t *pid)
{
    int pidfd = -1, gate[2];
    struct clone_args arguments = {
        .flags = (order->namespaces & ~(uint64_t)CLONE_NEWNET) | CLONE_PIDFD,
        .pidfd = (uintptr_t)&pidfd,
        .exit_signal = SIGCHLD,
    };
    if (order->cgroup >= 0) {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = descriptors[order->cgroup];
    }
    if (order->namespaces & CLONE_NEWNET && enter_network())
        return -1;
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, gate))
        return -1;
    *pid = syscall(SYS_clone3, &arguments, sizeof arguments);
    if (*pid == 0) {
        close(gate[1]);
        be_born(order, rest + order->uid_map_bytes + order->gid_map_bytes + order->layers_bytes, gate[0]);
    }
    int error = *pid < 0 ? errno : 0;
    if (order->namespaces & CLONE_NEWNET && setns(own_network, CLONE_NEWNET))
        _exit(1);
    if (!error && release(*pid, order, rest, gate[1])) {
        error = errno;
        syscall(SYS_pidfd_send_signal, pidfd, SIGKILL, NULL, 0);
        close(pidfd);
    }
    close(gate[0]);
    close(gate[1]);
    errno = error;
    return error ? -1 : pidfd;
}

static void obey(int socket)
{
    struct spawn order;
    memcpy(&order, message, sizeof order);
    const char *rest = message + sizeof order;
    struct spawned reply = {.identity = order.identity};
    int pidfd = -1;
    if (order.identity == 0) { /* for the spawner itself: where all of its cells shall start from */
        uint32_t step = carry_out_all(rest, order.num_operations);
        reply.pid = step;
        reply.error = errno;
        leave_keeper();
        pidfd = given;
        given = -1;
    } else {
        pid_t pid = 0;
        pidfd = spawn(&order, rest, &pid);
        reply.pid = pid;
        reply.error = pidfd < 0 ? errno : 0;
    }
    if (pass(socket, &reply, sizeof reply, &pidfd, pidfd >= 0))
        _exit(1);
    if (pidfd >= 0)
        close(pidfd);
    for (int i = 0; i < num_descriptors; i++)
        close(descriptors[i]);
}

static int leave(void)
{
    if (network_maker > 0) {
        kill(network_maker, SIGKILL);
        waitpid(network_maker, NULL, 0);
    }
    return 0;
}

int main(int count, char **arguments)
{
    if (count != 3)
        return 2;
    int nothing = fcntl(0, F_DUPFD_CLOEXEC, LAYER + 1); /* keeps the places where a cell's agent looks */
    int socket = fcntl(atoi(arguments[1]), F_DUPFD_CLOEXEC, nothing + 1);
    agent = fcntl(atoi(arguments[2]), F_DUPFD_CLOEXEC, socket + 1);
    if (nothing < 0 || socket < 0 || agent < 0 || dup3(nothing, CONTROL, O_CLOEXEC) < 0 ||
        dup3(nothing, LAYER, O_CLOEXEC) < 0)
        return 2;
    for (int descriptor = nothing; descriptor <= agent; descriptor++)
        if (descriptor != socket && descriptor != agent)
            close(descriptor);
    close_range(agent + 1, ~0u, 0);
    signal(SIGCHLD, SIG_IGN); /* the kernel reaps; a pidfd still tells of the end */
    signal(SIGINT, SIG_IGN);  /* from a terminal, or whoever ends a whole group or service, they are meant for the node */
    signal(SIGQUIT, SIG_IGN);
    signal(SIGTERM, SIG_IGN);
    signal(SIGHUP, SIG_IGN);
    umask(0);
    struct pollfd watched[2] = {{socket, POLLIN, 0}, {syscall(SYS_pidfd_open, getppid(), 0), POLLIN, 0}};
    for (;;) {
        if (poll(watched, 2, -1) < 0 && errno != EINTR)
            return 1;
        if (watched[1].revents)
            return leave();
        if (watched[0].revents) {
            if (take(socket, message, sizeof message, descriptors, &num_descriptors) <= 0)
                return leave();
            obey(socket);
        }
    }
}
