/* SPDX-License-Identifier: Apache-2.0 */
/* A process that lives and dies as its argument says. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "signals.h"

#define THREADS 8

static pthread_barrier_t barrier;

static void *exit_group_later(void *unused)
{
	usleep(200 * 1000);
	_exit(7);
	return unused;
}

static void *die_with_all(void *unused)
{
	pthread_barrier_wait(&barrier);
	syscall(SYS_exit, 0);
	return unused;
}

/* The leader dies first; the process goes on and ends with status 7. */
static int leader_dies_first(void)
{
	pthread_t thread;

	pthread_create(&thread, NULL, exit_group_later, NULL);
	syscall(SYS_exit, 0);
	return 1;
}

/* All threads end at once, each by itself. */
static int threads_race(void)
{
	pthread_t thread;

	pthread_barrier_init(&barrier, NULL, THREADS);
	for (int i = 1; i < THREADS; i++)
		pthread_create(&thread, NULL, die_with_all, NULL);
	die_with_all(NULL);
	return 1;
}

static int eat(int limit)
{
	for (int mebibytes = 0; mebibytes < limit; mebibytes++) {
		char *memory = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		if (memory == MAP_FAILED)
			return 1;
		memset(memory, 1, 1 << 20);
	}
	return 0;
}

/* Takes 3 MiB, holds them, gives them back and waits, for ever, and cannot be chosen by the OOM killer. */
static int come_and_go(void)
{
	int score = open("/proc/self/oom_score_adj", O_WRONLY);
	time_t end = time(NULL) + 60;

	if (score < 0 || write(score, "-1000", 5) != 5)
		return 1;
	while (time(NULL) < end) {
		char *memory = mmap(NULL, 3 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		if (memory == MAP_FAILED)
			return 1;
		memset(memory, 1, 3 << 20);
		usleep(2000);
		munmap(memory, 3 << 20);
		usleep(2000);
	}
	return 1;
}

static int segv(void)
{
	*(volatile int *)8 = 1;
	return 1;
}

static int connect_to(const char *port, const char *host)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(atoi(port)) };
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	inet_pton(AF_INET, host, &address.sin_addr);
	return connect(fd, (struct sockaddr *)&address, sizeof(address)) ? 1 : 0;
}

/* Wants CPU 0 all the time. */
static int spin(void)
{
	cpu_set_t first;

	CPU_ZERO(&first);
	CPU_SET(0, &first);
	if (sched_setaffinity(0, sizeof(first), &first))
		return 1;
	alarm(60);
	for (;;)
		;
}

/* A network of its own, in which only the loopback is. */
static int alone(void)
{
	struct ifreq loopback = { .ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING };
	int fd;

	if (unshare(CLONE_NEWNET))
		return 1;
	fd = socket(AF_INET, SOCK_DGRAM, 0);
	return ioctl(fd, SIOCSIFFLAGS, &loopback) || close(fd);
}

static socklen_t address_of(const char *host, int port, struct sockaddr_storage *address)
{
	struct sockaddr_in *v4 = (void *)address;
	struct sockaddr_in6 *v6 = (void *)address;

	memset(address, 0, sizeof(*address));
	if (inet_pton(AF_INET, host, &v4->sin_addr) == 1) {
		v4->sin_family = AF_INET;
		v4->sin_port = htons(port);
		return sizeof(*v4);
	}
	inet_pton(AF_INET6, host, &v6->sin6_addr);
	v6->sin6_family = AF_INET6;
	v6->sin6_port = htons(port);
	return sizeof(*v6);
}

/* Answers as the name's first label says: silent, missing, broken, late, or anything else for a good answer. */
static void resolve(int fd)
{
	struct sockaddr_storage from;
	unsigned char message[512];

	for (;;) {
		socklen_t length = sizeof(from);
		ssize_t bytes = recvfrom(fd, message, sizeof(message), 0, (struct sockaddr *)&from, &length);
		const char *name = (char *)message + 13;

		if (bytes < 17 || !strncmp(name, "silent", 6))
			continue;
		if (!strncmp(name, "late", 4))
			usleep(200 * 1000);
		message[2] |= 0x80;
		message[3] = !strncmp(name, "missing", 7) ? 3 : !strncmp(name, "broken", 6) ? 2 : 0;
		sendto(fd, message, bytes, 0, (struct sockaddr *)&from, length);
	}
}

/* Asks a resolver of its own for the name; of an empty answer it waits half a second. */
static int look_up(const char *name, const char *host)
{
	unsigned char query[512] = { 0x12, 0x34, 1, 0, 0, 1 };
	struct timeval patience = { .tv_usec = 500 * 1000 };
	struct sockaddr_storage address;
	socklen_t length = address_of(host, 53, &address);
	int server, client, bytes = 12;
	pid_t resolver;

	if (alone())
		return 77;
	server = socket(address.ss_family, SOCK_DGRAM, 0);
	client = socket(address.ss_family, SOCK_DGRAM, 0);
	if (bind(server, (struct sockaddr *)&address, length) || connect(client, (struct sockaddr *)&address, length))
		return 1;
	resolver = fork();
	if (!resolver) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		resolve(server);
	}
	for (const char *label = name; *label;) {
		int chars = strcspn(label, ".");

		query[bytes++] = chars;
		memcpy(query + bytes, label, chars);
		bytes += chars;
		label += chars + (label[chars] == '.');
	}
	/* The root, AAAA, IN. */
	query[bytes + 2] = 28;
	query[bytes + 4] = 1;
	setsockopt(client, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	send(client, query, bytes + 5, 0);
	recv(client, query, sizeof(query), 0);
	kill(resolver, SIGKILL);
	return 0;
}

/* Three ask for a connection where the queue holds one. */
static int overflow(int port, const char *host)
{
	struct sockaddr_storage address;
	socklen_t length = address_of(host, port, &address);
	int listener;

	if (alone())
		return 77;
	listener = socket(address.ss_family, SOCK_STREAM, 0);
	if (bind(listener, (struct sockaddr *)&address, length) || listen(listener, 0))
		return 1;
	for (int client = 0; client < 3; client++) {
		connect(socket(address.ss_family, SOCK_STREAM | SOCK_NONBLOCK, 0), (struct sockaddr *)&address, length);
		usleep(20 * 1000);
	}
	return 0;
}

/* A hundred datagrams for a socket that has no room for them: the status is how many it took. */
static int flood(void)
{
	char datagram[1000] = "";
	struct sockaddr_storage address;
	socklen_t length = address_of("127.0.0.1", 4244, &address);
	int receiver, sender, room = 1, taken = 0;

	if (alone())
		return 177;
	receiver = socket(AF_INET, SOCK_DGRAM, 0);
	sender = socket(AF_INET, SOCK_DGRAM, 0);
	setsockopt(receiver, SOL_SOCKET, SO_RCVBUF, &room, sizeof(room));
	if (bind(receiver, (struct sockaddr *)&address, length))
		return 178;
	for (int index = 0; index < 100; index++)
		sendto(sender, datagram, sizeof(datagram), 0, (struct sockaddr *)&address, length);
	while (recv(receiver, datagram, sizeof(datagram), MSG_DONTWAIT) > 0)
		taken++;
	return taken;
}

/* What is sent on a connection that was made no longer arrives. */
static int lost(const char *port)
{
	int listener, client, patience_ms = 700, error = 0;
	struct sockaddr_storage address;
	socklen_t length = address_of("127.0.0.1", atoi(port), &address), size = sizeof(error);
	char rules[300], data[1000] = "";

	if (alone())
		return 77;
	listener = socket(AF_INET, SOCK_STREAM, 0);
	client = socket(AF_INET, SOCK_STREAM, 0);
	if (bind(listener, (struct sockaddr *)&address, length) || listen(listener, 1) ||
	    connect(client, (struct sockaddr *)&address, length))
		return 1;
	snprintf(rules, sizeof(rules),
		 "nft 'add table t; add chain t c { type filter hook input priority 0; }; add rule t c tcp dport %s drop'", port);
	if (system(rules))
		return 77;
	setsockopt(client, IPPROTO_TCP, TCP_USER_TIMEOUT, &patience_ms, sizeof(patience_ms));
	if (send(client, data, sizeof(data), 0) != sizeof(data))
		return 1;
	poll(&(struct pollfd){ .fd = client, .events = POLLIN }, 1, 15000);
	getsockopt(client, SOL_SOCKET, SO_ERROR, &error, &size);
	return error == ETIMEDOUT ? 0 : 1;
}

/* Reads a file that the page cache does not hold. */
static int read_all(const char *path)
{
	static char part[1 << 20];
	int fd = open(path, O_RDONLY);

	posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
	while (read(fd, part, sizeof(part)) > 0)
		;
	return fd < 0;
}

static void *sleep_long(void *unused)
{
	sleep(60);
	return unused;
}

static int threads_sleep(void)
{
	pthread_t thread;

	for (int i = 1; i < THREADS; i++)
		pthread_create(&thread, NULL, sleep_long, NULL);
	sleep_long(NULL);
	return 1;
}

/* Opens more files than it may: 16 opens fail. */
static int exhaust(void)
{
	struct rlimit few = { 8, 8 };
	int failed = 0;

	if (setrlimit(RLIMIT_NOFILE, &few))
		return 1;
	while (failed < 16) {
		if (open("/dev/null", O_RDONLY) < 0) {
			if (errno != EMFILE)
				return 1;
			failed++;
		}
	}
	return 0;
}

/* Makes more processes than it may, as somebody whom the limit holds for; and reads where nothing is to be read. */
static int crowd(void)
{
	struct rlimit one = { 1, 1 };
	int ends[2];
	char byte;

	if (pipe2(ends, O_NONBLOCK) || read(ends[0], &byte, 1) != -1 || errno != EAGAIN)
		return 1;
	if (setresgid(65534, 65534, 65534) || setresuid(65534, 65534, 65534) || setrlimit(RLIMIT_NPROC, &one))
		return 1;
	for (int tries = 0; tries < 8; tries++) {
		pid_t child = fork();

		if (child == 0)
			_exit(0);
		if (child > 0 || errno != EAGAIN)
			return 1;
	}
	return 0;
}

static int open_file(const char *path, const char *directory)
{
	if (directory && chdir(directory))
		return 1;
	return open(path, O_RDONLY | O_CLOEXEC) < 0 ? 1 : 0;
}

/* From now on every write to the file system at `path` fails. */
static int cut(const char *path)
{
	unsigned int without_flush = 2;
	int directory = open(path, O_RDONLY);

	return directory < 0 || ioctl(directory, _IOR('X', 125, unsigned int), &without_flush);
}

/* Sends itself a signal that it ignores, without a pause, until somebody kills it or a minute is over. */
static int hang_up_for_ever(void)
{
	time_t end = time(NULL) + 60;

	signal(SIGHUP, SIG_IGN);
	while (time(NULL) < end)
		for (int i = 0; i < 1000; i++)
			kill(getpid(), SIGHUP);
	return 1;
}

/* Starts itself again and again, as something that fails at once. */
static int start_for_ever(const char *self)
{
	time_t end = time(NULL) + 60;

	while (time(NULL) < end) {
		pid_t child = vfork();

		if (!child) {
			execl(self, self, "no-such-way", NULL);
			_exit(1);
		}
		waitpid(child, NULL, 0);
	}
	return 1;
}

/* Makes and removes a cgroup below `path`, again and again. */
static int make_cgroups_for_ever(const char *path)
{
	time_t end = time(NULL) + 60;
	char name[512];

	snprintf(name, sizeof(name), "%s/flood", path);
	while (time(NULL) < end) {
		mkdir(name, 0755);
		rmdir(name);
	}
	rmdir(name);
	return 1;
}

int main(int argc, char **argv)
{
	const char *how = argc > 1 ? argv[1] : "";

	if (!strcmp(how, "sleep"))
		return sleep(60) ? 1 : 0;
	if (!strcmp(how, "queue") && argc > 5)
		return queue(atoi(argv[2]), atoi(argv[3]), atoi(argv[4]), atoi(argv[5]));
	if (!strcmp(how, "queue-for-ever") && argc > 2)
		return queue_for_ever(atoi(argv[2]));
	if (!strcmp(how, "ring") && argc > 2)
		return ring(atoi(argv[2]));
	if (!strcmp(how, "notify") && argc > 2)
		return notify(atoi(argv[2]));
	if (!strcmp(how, "threads-sleep"))
		return threads_sleep();
	if (!strcmp(how, "exhaust"))
		return exhaust();
	if (!strcmp(how, "crowd"))
		return crowd();
	if (!strcmp(how, "open") && argc > 2)
		return open_file(argv[2], argc > 3 ? argv[3] : NULL);
	if (!strcmp(how, "spin"))
		return spin();
	if (!strcmp(how, "segv"))
		return segv();
	if (!strcmp(how, "eat"))
		return eat(512);
	if (!strcmp(how, "come-and-go"))
		return come_and_go();
	if (!strcmp(how, "hold"))
		return eat(20) == 0 && sleep(60) ? 1 : 0;
	if (!strcmp(how, "leader-dies-first"))
		return leader_dies_first();
	if (!strcmp(how, "threads-race"))
		return threads_race();
	if (!strcmp(how, "look-up") && argc > 3)
		return look_up(argv[2], argv[3]);
	if (!strcmp(how, "overflow") && argc > 3)
		return overflow(atoi(argv[2]), argv[3]);
	if (!strcmp(how, "flood"))
		return flood();
	if (!strcmp(how, "hang-up"))
		return hang_up_for_ever();
	if (!strcmp(how, "start"))
		return start_for_ever(argv[0]);
	if (!strcmp(how, "make-cgroups") && argc > 2)
		return make_cgroups_for_ever(argv[2]);
	if (!strcmp(how, "lost") && argc > 2)
		return lost(argv[2]);
	if (!strcmp(how, "read") && argc > 2)
		return read_all(argv[2]);
	if (!strcmp(how, "cut") && argc > 2)
		return cut(argv[2]);
	if (!strcmp(how, "connect") && argc > 2)
		return connect_to(argv[2], argc > 3 ? argv[3] : "127.0.0.1");
	return 2;
}
