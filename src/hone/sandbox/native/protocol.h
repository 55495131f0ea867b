/* What node, spawner and agent say to one another: fixed headers in host byte order, one message each. */
#ifndef HONE_PROTOCOL_H
#define HONE_PROTOCOL_H

#include <stdint.h>

/* The largest message: with it, a socket's default buffer still takes one. */
#define MESSAGE_BYTES (176 << 10)
#define MAX_DESCRIPTORS 64

/* Descriptors of an agent when it starts: its control socket, and the cell's writable layer. */
#define CONTROL 3
#define LAYER 4

/* Where the trees of layers begin. */
#define FIRST_LAYER 64
#define MAX_LAYERS 64

/* node -> spawner, followed by uid map, gid map, the folders of layers, each with a zero, and operations. A layer's path
   that does not begin with a slash is one of the keeper's mounts. The first descriptor is the agent's control socket. */
struct spawn {
    uint64_t identity;
    uint64_t namespaces; /* CLONE_NEW...; a new network is one of those that are ready */
    int32_t cgroup;      /* which of the descriptors is the cgroup to be born in; -1: none */
    uint32_t uid_map_bytes;
    uint32_t gid_map_bytes;
    uint32_t num_layers;
    uint32_t layers_bytes;
    uint32_t maps_layers; /* whether layers shall belong to the cell's ids */
    uint32_t num_operations;
};

/* spawner -> node, with a pidfd, or with what OPERATION_GIVE or OPERATION_SOCKET made. */
struct spawned {
    uint64_t identity;
    int32_t pid;
    int32_t error;
};

/* One thing a cell's first process does to itself before it becomes the agent; `size` bytes follow, padded to 8. */
struct operation {
    uint32_t code;
    uint32_t size;
    uint64_t a, b;
};

enum {
    OPERATION_MOUNT = 1,      /* source\0 target\0 type\0 data\0; a: flags */
    OPERATION_MAKE_FOLDER,    /* path; a: mode; b: what is there already will do: 1 anything, 2 a folder or a link to one in
                                 the root's own file system, 3 a folder only; all else is removed for it */
    OPERATION_LINK,           /* target\0 path\0 */
    OPERATION_WRITE,          /* path\0 content; a: mode, or 0 for a file that is there */
    OPERATION_TAKE_TREE,      /* path; a: slot for a copy of the mount there; b: with the mounts below */
    OPERATION_PUT_TREE,       /* path; a: slot; b: attributes (MOUNT_ATTR_...) */
    OPERATION_KEEP,           /* path of the writable layer: the agent keeps a copy of its mount, and names it to the node */
    OPERATION_PIVOT,          /* path of the new root */
    OPERATION_HOSTNAME,       /* name */
    OPERATION_NETWORKS,       /* keep a empty networks ready, each with a loopback */
    OPERATION_LIMIT,          /* a: resource; b: value */
    OPERATION_FILTER,         /* BPF instructions */
    OPERATION_DROP_POWERS,    /* all capabilities */
    OPERATION_IDENTITY,       /* a: uid; b: gid */
    OPERATION_JOIN,           /* a: which of the descriptors is the `tasks` file of a cgroup (v1) */
    OPERATION_CORES,          /* mask */
    OPERATION_LANDLOCK,       /* files, network, scopes; then rules: access, size of path, path\0 padded to 8 */
    OPERATION_UNSHARE,        /* a: namespaces */
    OPERATION_LEAVE,          /* unmount the old root */
    OPERATION_UNMOUNT,        /* path, with what is mounted below */
    OPERATION_BECOME_AGENT,
    OPERATION_SOCKET,         /* of the network that the process of the first descriptor is in; a: port of the loopback,
                                 plus 1 << 16 for that of IPv6; b: listen for so many that wait, or connect for 0 */
    OPERATION_KEEPER,         /* the following ones in a view of mounts of its own, where layers of cells are kept */
    OPERATION_TAKE_DESCRIPTOR, /* a: slot for the tree that is one of the descriptors; b: which */
    OPERATION_GIVE,            /* path of a folder, of which the node gets a descriptor */
    OPERATION_EXECUTE = 32,    /* arguments, each with a zero: another runtime's program; a: which descriptor is its stderr */
    OPERATION_DATA,            /* content; a: the descriptor by which that program reads it */
    OPERATION_GUARD,           /* stay behind as the guardian of what the child becomes, and end all it leaves */
};

/* node -> agent; for START followed by folder\0, arguments, environment, with three or four descriptors:
   stdin, stdout, stderr and the cgroup to be born in, or a file of it to write to. */
struct request {
    uint32_t kind;
    uint32_t identity;
    uint32_t flags; /* START: FLAG_...; SIGNAL: the signal */
    uint32_t num_arguments;
    uint32_t num_variables;
    uint32_t strings_bytes;
};

enum { REQUEST_START = 1, REQUEST_SIGNAL, REQUEST_KILL_TREE };

/* A program has a terminal; it enters its cgroup by writing to the file that came along; it can signal what it starts
   and nothing else, the agent least of all: where that is not process 1. */
enum { FLAG_TERMINAL = 1, FLAG_JOINS = 2, FLAG_APART = 4 };

/* agent -> node; READY comes with the root and, where there is one, the writable layer; FAILED, from before there is an
   agent, says at which operation. */
struct report {
    uint32_t kind;
    uint32_t identity;
    int32_t status;
    int32_t error;
    uint64_t user_microseconds;
    uint64_t system_microseconds;
    uint64_t peak_kilobytes;
};

enum { REPORT_READY = 1, REPORT_FAILED, REPORT_ENDED };

#endif
