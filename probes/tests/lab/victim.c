/* SPDX-License-Identifier: Apache-2.0 */
/* A process that lives and dies as its argument says. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

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

int main(int argc, char **argv)
{
	const char *how = argc > 1 ? argv[1] : "";

	if (!strcmp(how, "sleep"))
		return sleep(60) ? 1 : 0;
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
	if (!strcmp(how, "hold"))
		return eat(20) == 0 && sleep(60) ? 1 : 0;
	if (!strcmp(how, "leader-dies-first"))
		return leader_dies_first();
	if (!strcmp(how, "threads-race"))
		return threads_race();
	if (!strcmp(how, "connect") && argc > 2)
		return connect_to(argv[2], argc > 3 ? argv[3] : "127.0.0.1");
	return 2;
}
