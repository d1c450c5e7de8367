/* A deadline that SIGTERM sets for the process, which the kernel keeps.

   A handler in Python waits until the main thread runs Python code again: while that is in one long
   call of C code, the default action would have ended the process at once. So a handler in C comes
   before that of Python. Once it has been called, a timer sends the signal again: no thread of the
   program has to run for that. The second has the default action, unless it follows at once: pools
   and servers send two in a row to a worker. Only what may be called in a signal handler is called
   there. Linux only. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* As the system call has it. That of the C library, with timer_create(), may allocate memory. */
struct timer_span {
    long interval[2];
    long value[2];
};

static void (*python_handler)(int);
static long first_span[2];
static double seconds_for_repeats;
static struct timespec first_time;
/* A forked child has no timer of its parent. */
static volatile pid_t process_with_timer;
static int timer;

static int
has_timer(void)
{
    return process_with_timer == getpid();
}

static void
start_timer(const long *seconds_and_nanoseconds)
{
    struct timer_span span = {{0, 0}, {seconds_and_nanoseconds[0], seconds_and_nanoseconds[1]}};
    syscall(SYS_timer_settime, timer, 0, &span, NULL);
}

static double
seconds_since_first(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)(time.tv_sec - first_time.tv_sec)
           + 1e-9 * (double)(time.tv_nsec - first_time.tv_nsec);
}

static void
restore_default(int signum)
{
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = SIG_DFL;
    sigaction(signum, &action, NULL);
}

static void
on_sigterm(int signum)
{
    int saved_errno = errno;
    if (has_timer()) {
        if (seconds_since_first() >= seconds_for_repeats) {
            restore_default(signum);
            raise(signum);
        }
        errno = saved_errno;
        return;
    }
    struct sigevent event;
    memset(&event, 0, sizeof event);
    event.sigev_notify = SIGEV_SIGNAL;
    event.sigev_signo = signum;
    if (syscall(SYS_timer_create, CLOCK_MONOTONIC, &event, &timer) == 0) {
        process_with_timer = getpid();
        clock_gettime(CLOCK_MONOTONIC, &first_time);
        start_timer(first_span);
    }
    errno = saved_errno;
    python_handler(signum);
}

static int
as_span(PyObject *seconds, long *span)
{
    double value = PyFloat_AsDouble(seconds);
    if (value == -1.0 && PyErr_Occurred()) {
        return -1;
    }
    span[0] = (long)value;
    span[1] = (long)((value - (double)span[0]) * 1e9);
    return 0;
}

static PyObject *
set_in_advance(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *seconds;
    struct sigaction action;
    if (!PyArg_ParseTuple(args, "Od", &seconds, &seconds_for_repeats)
        || as_span(seconds, first_span) < 0) {
        return NULL;
    }
    if (sigaction(SIGTERM, NULL, &action) < 0 || action.sa_flags & SA_SIGINFO
        || action.sa_handler == SIG_DFL || action.sa_handler == SIG_IGN) {
        Py_RETURN_NONE;
    }
    if (action.sa_handler != on_sigterm) {
        python_handler = action.sa_handler;
    }
    action.sa_handler = on_sigterm;
    sigaction(SIGTERM, &action, NULL);
    Py_RETURN_NONE;
}

static PyObject *
postpone(PyObject *module, PyObject *seconds)
{
    (void)module;
    long span[2];
    if (as_span(seconds, span) < 0) {
        return NULL;
    }
    if (has_timer()) {
        start_timer(span);
    }
    Py_RETURN_NONE;
}

static PyObject *
cancel(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    if (has_timer()) {
        syscall(SYS_timer_delete, timer);
        process_with_timer = 0;
    }
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"set_in_advance", set_in_advance, METH_VARARGS,
     "Let the next SIGTERM end the process after so many seconds, whatever its handler does, "
     "and those that follow within so many seconds do nothing."},
    {"postpone", postpone, METH_O, "Give so many seconds from now, if SIGTERM has come."},
    {"cancel", cancel, METH_NOARGS, "Let the deadline pass, if SIGTERM has come."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot module_slots[] = {
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED},
#endif
    {0, NULL},
};

static struct PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "closewait_guard._signal._deadline",
    .m_doc = "A deadline that SIGTERM sets for the process, which the kernel keeps.",
    .m_methods = methods,
    .m_slots = module_slots,
};

PyMODINIT_FUNC
PyInit__deadline(void)
{
    return PyModuleDef_Init(&module_definition);
}
