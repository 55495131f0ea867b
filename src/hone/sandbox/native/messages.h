/* Messages with descriptors over a SOCK_SEQPACKET socket. */
#ifndef HONE_MESSAGES_H
#define HONE_MESSAGES_H

#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "protocol.h"

/* Send a message with descriptors. */
static int pass(int socket, const void *data, size_t size, const int *passed, int num_passed)
{
    char control[CMSG_SPACE(MAX_LAYERS * sizeof(int))] = {0};
    struct iovec part = {(void *)data, size};
    struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1};
    if (num_passed) {
        header.msg_control = control;
        header.msg_controllen = CMSG_SPACE(num_passed * sizeof(int));
        struct cmsghdr *first = CMSG_FIRSTHDR(&header);
        first->cmsg_level = SOL_SOCKET;
        first->cmsg_type = SCM_RIGHTS;
        first->cmsg_len = CMSG_LEN(num_passed * sizeof(int));
        memcpy(CMSG_DATA(first), passed, num_passed * sizeof(int));
    }
    return sendmsg(socket, &header, MSG_NOSIGNAL) == (ssize_t)size ? 0 : -1;
}

/* The next message with its descriptors; 0 when the other side is gone. */
static ssize_t take(int socket, void *data, size_t size, int *taken, int *num_taken)
{
    char control[CMSG_SPACE(MAX_DESCRIPTORS * sizeof(int))];
    struct iovec part = {data, size};
    struct msghdr header = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    ssize_t got = recvmsg(socket, &header, MSG_CMSG_CLOEXEC);
    struct cmsghdr *first = CMSG_FIRSTHDR(&header);
    *num_taken = 0;
    if (got > 0 && first && first->cmsg_type == SCM_RIGHTS) {
        *num_taken = (first->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        memcpy(taken, CMSG_DATA(first), *num_taken * sizeof(int));
    }
    return got;
}

#endif
