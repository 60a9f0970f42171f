/* SPDX-License-Identifier: Apache-2.0 */
/* Signals that the kernel sends because a process asked for them, and some that a process makes up. */
#pragma once

/* Queues a signal with this code, by the first, second or third of the calls that take one from the caller. */
static int queue(pid_t pid, int number, int code, int call)
{
	siginfo_t info = { .si_signo = number, .si_code = code };

	info.si_pid = getpid();
	if (call == 1)
		return !!syscall(SYS_rt_sigqueueinfo, pid, number, &info);
	if (call == 2)
		return !!syscall(SYS_rt_tgsigqueueinfo, pid, pid, number, &info);
	return !!syscall(SYS_pidfd_send_signal, (int)syscall(SYS_pidfd_open, pid, 0), number, &info, 0);
}

/* The same without a pause, of a signal that changes nothing. */
static int queue_for_ever(pid_t pid)
{
	time_t end = time(NULL) + 60;

	while (time(NULL) < end)
		for (int i = 0; i < 1000; i++)
			queue(pid, SIGURG, -2, 1);
	return 1;
}

/* A timer of its own sends it a signal. */
static int ring(int number)
{
	struct sigevent event = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = number };
	struct itimerspec soon = { .it_value.tv_nsec = 300 * 1000 * 1000 };
	int timer = 0;

	return syscall(SYS_timer_create, CLOCK_MONOTONIC, &event, &timer) ||
	       syscall(SYS_timer_settime, timer, 0, &soon, NULL) || sleep(60);
}

/* A child writes to the queue of messages that its parent asked for a signal of. */
static int notify(int number)
{
	struct sigevent event = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = number };
	char name[32];
	int mailbox;

	snprintf(name, sizeof(name), "tapio-%d", getpid());
	mailbox = syscall(SYS_mq_open, name, O_RDWR | O_CREAT, 0600, NULL);
	syscall(SYS_mq_unlink, name);
	if (mailbox < 0 || syscall(SYS_mq_notify, mailbox, &event))
		return 1;
	if (!fork())
		_exit(!!syscall(SYS_mq_timedsend, mailbox, "", 1, 0, NULL));
	return sleep(60) ? 1 : 0;
}
