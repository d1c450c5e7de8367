/* What happens at each creation and at each end of a socket, in C: the twin of `on_create` in
   recorder.py, and of `wrap_del` in hooks.py.

   Twins do the same; the tests run with each. Only public functions of CPython are used, those of
   3.11. No reference to a frame outlives a call. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>
#include <stddef.h>
#include <time.h>

/* The fields of a record. Their order is that of `Creation`, which a recorder is given. */
enum field {
    SOCK,
    OBJECT_ID,
    SERIAL,
    PID,
    OPENED_AT,
    THREAD,
    TASK,
    LABELS,
    CONTEXT,
    ORIGIN,
    PARENT,
    STACK,
    FIELD_COUNT
};

static const char *const field_names[FIELD_COUNT] = {
    "sock", "object_id", "serial",  "pid",    "opened_at", "thread",
    "task", "labels",    "context", "origin", "parent",    "stack",
};

/* What a recorder is made with, and keeps. */
enum part {
    CREATIONS,
    DETACHED,
    LISTENERS,
    THREADS,
    MODULES,
    ENDS,
    FILENO,
    REFERENCE_CALLBACK,
    LABELS_VARIABLE,
    PROVIDER,
    FALLBACK_PROVIDER,
    NO_CONTEXT,
    CREATED,
    ACCEPTED,
    ACCEPT_CODE,
    AS_PARENT,
    ORIGIN_OF,
    NOTE_TASK,
    EXACT_TEXT,
    INTERN_STACKS,
    PART_COUNT
};

/* Names that are looked up at each creation. */
enum name { NAME, RUNNING_LOOP, ASYNCIO, TRIO, NAME_COUNT };

static const char *const name_texts[NAME_COUNT] = {"_name", "_get_running_loop", "_asyncio", "trio"};

typedef struct {
    PyObject_HEAD
    PyObject *parts[PART_COUNT];
    PyObject *names[NAME_COUNT];
    Py_ssize_t position[FIELD_COUNT];
    Py_ssize_t depth;
    long long pid;
    /* Numbers of events: the latest of all, the latest creation, and the one at which stacks are made
       small again, so many later at least. */
    long long counted;
    long long last_serial;
    long long intern_at;
    long long intern_after;
} Recorder;

/* A creation while it is written. */
typedef struct {
    PyObject *sock;
    PyObject *fd;
    PyObject *descriptor;
    PyObject *thread_id;
    PyFrameObject *caller;
    PyObject *values[FIELD_COUNT];
} Draft;

/* A new reference to a value of a dictionary; NULL without an exception where there is none. */
static PyObject *
look_up(PyObject *dict, PyObject *key)
{
#if PY_VERSION_HEX >= 0x030D0000
    PyObject *value;
    (void)PyDict_GetItemRef(dict, key, &value);
    return value;
#else
    PyObject *value = PyDict_GetItemWithError(dict, key);
    Py_XINCREF(value);
    return value;
#endif
}

/* Whether a weak reference is to an object that exists still. */
static int
refers_to(PyObject *reference, PyObject *object)
{
    if (!PyWeakref_Check(reference)) {
        return 0;
    }
#if PY_VERSION_HEX >= 0x030D0000
    PyObject *referent;
    (void)PyWeakref_GetRef(reference, &referent);
    Py_XDECREF(referent);
#else
    PyObject *referent = PyWeakref_GetObject(reference);
#endif
    return referent == object;
}

/* The frame that creates the socket: it has called our `__init__`, which has called this. */
static PyFrameObject *
frame_of_caller(void)
{
    PyFrameObject *init = PyThreadState_GetFrame(PyThreadState_Get());
    PyFrameObject *caller = NULL;
    if (init != NULL) {
        caller = PyFrame_GetBack(init);
        Py_DECREF(init);
    }
    if (caller == NULL && !PyErr_Occurred()) {
        PyErr_SetString(PyExc_ValueError, "call stack is not deep enough");
    }
    return caller;
}

static int
is_end(PyObject *ends, PyObject *code)
{
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(ends); i++) {
        if (PyTuple_GET_ITEM(ends, i) == code) {
            return 1;
        }
    }
    return 0;
}

/* Calls to take before their place is asked of the allocator. */
#define FEW_CALLS 64

/* A list of so many objects, whose references it takes. */
static PyObject *
list_of(PyObject **objects, Py_ssize_t count)
{
    PyObject *list = PyList_New(count);
    for (Py_ssize_t i = 0; i < count; i++) {
        if (list != NULL) {
            PyList_SET_ITEM(list, i, objects[i]);
        }
        else {
            Py_DECREF(objects[i]);
        }
    }
    return list;
}

/* The codes and offsets of at most `depth` calls, from a frame outwards, and but for the first none
   from the first end on. How many objects that are; -1 with an exception. */
static Py_ssize_t
take_calls(PyObject **taken, PyFrameObject *innermost, Py_ssize_t depth, PyObject *ends)
{
    Py_ssize_t count = 0;
    PyFrameObject *frame = innermost;
    Py_INCREF(frame);
    while (frame != NULL && count < 2 * depth) {
        PyObject *code = (PyObject *)PyFrame_GetCode(frame);
        if (count > 0 && is_end(ends, code)) {
            Py_DECREF(code);
            break;
        }
        taken[count++] = code;
        PyObject *offset = PyLong_FromLong(PyFrame_GetLasti(frame));
        PyFrameObject *back = NULL;
        if (offset != NULL) {
            taken[count++] = offset;
            back = PyFrame_GetBack(frame);
        }
        Py_DECREF(frame);
        frame = back;
        /* There is no memory for a number, or for the object of a frame that goes on. */
        if (frame == NULL && PyErr_Occurred()) {
            while (count > 0) {
                Py_DECREF(taken[--count]);
            }
            return -1;
        }
    }
    Py_XDECREF(frame);
    return count;
}

static Py_ssize_t
count_calls(PyFrameObject *innermost, Py_ssize_t most)
{
    Py_ssize_t count = 0;
    PyFrameObject *frame = innermost;
    Py_INCREF(frame);
    while (frame != NULL && count < most) {
        PyFrameObject *back = PyFrame_GetBack(frame);
        Py_DECREF(frame);
        frame = back;
        count++;
    }
    Py_XDECREF(frame);
    return PyErr_Occurred() ? -1 : count;
}

static PyObject *
capture(PyFrameObject *innermost, Py_ssize_t depth, PyObject *ends)
{
    PyObject *few[2 * FEW_CALLS], **taken = few;
    if (depth > FEW_CALLS) {
        depth = count_calls(innermost, depth);
        if (depth < 0) {
            return NULL;
        }
        taken = PyMem_New(PyObject *, 2 * depth);
        if (taken == NULL) {
            return PyErr_NoMemory();
        }
    }
    Py_ssize_t count = take_calls(taken, innermost, depth, ends);
    PyObject *stack = count < 0 ? NULL : list_of(taken, count);
    if (taken != few) {
        PyMem_Free(taken);
    }
    return stack;
}

static PyObject *
name_of_thread(Recorder *self, Draft *draft)
{
    PyObject *thread = look_up(self->parts[THREADS], draft->thread_id);
    if (thread == NULL) {
        return PyErr_Occurred() ? NULL : PyUnicode_FromFormat("thread-%S", draft->thread_id);
    }
    PyObject *name = PyObject_GetAttr(thread, self->names[NAME]);
    Py_DECREF(thread);
    if (name != NULL && !PyUnicode_CheckExact(name)) {
        Py_SETREF(name, PyObject_CallOneArg(self->parts[EXACT_TEXT], name));
    }
    return name;
}

/* Whether an event loop runs in this thread, or trio may run one; -1 with an exception. */
static int
may_be_in_task(Recorder *self)
{
    PyObject *asyncio = look_up(self->parts[MODULES], self->names[ASYNCIO]);
    if (asyncio == NULL && PyErr_Occurred()) {
        return -1;
    }
    /* None where something keeps it from being imported. */
    if (asyncio != NULL && asyncio != Py_None) {
        PyObject *loop = PyObject_CallMethodNoArgs(asyncio, self->names[RUNNING_LOOP]);
        Py_DECREF(asyncio);
        Py_XDECREF(loop);
        if (loop != Py_None) {
            return loop == NULL ? -1 : 1;
        }
    }
    return PyDict_Contains(self->parts[MODULES], self->names[TRIO]);
}

static PyObject *
name_of_task(Recorder *self, Draft *draft)
{
    switch (may_be_in_task(self)) {
    case 0:
        Py_RETURN_NONE;
    case 1:
        return PyObject_CallFunctionObjArgs(
            self->parts[NOTE_TASK], draft->values[STACK], draft->caller, NULL);
    default:
        return NULL;
    }
}

static PyObject *
current_labels(Recorder *self)
{
    PyObject *labels;
    return PyContextVar_Get(self->parts[LABELS_VARIABLE], NULL, &labels) < 0 ? NULL : labels;
}

static PyObject *
answer_of_provider(Recorder *self)
{
    if (self->parts[PROVIDER] == Py_None) {
        return Py_NewRef(self->parts[NO_CONTEXT]);
    }
    PyObject *answer = PyObject_CallNoArgs(self->parts[PROVIDER]);
    int is_true = answer == NULL ? -1 : PyObject_IsTrue(answer);
    if (is_true <= 0) {
        Py_CLEAR(answer);
    }
    return is_true == 0 ? PyObject_CallNoArgs(self->parts[FALLBACK_PROVIDER]) : answer;
}

/* The seconds since the epoch; no function that a test replaces. */
static PyObject *
wall_time(void)
{
    struct timespec now;
    if (timespec_get(&now, TIME_UTC) != TIME_UTC) {
        PyErr_SetString(PyExc_OSError, "the time cannot be read");
        return NULL;
    }
    return PyFloat_FromDouble((double)now.tv_sec + (double)now.tv_nsec * 1e-9);
}

static int
put_origin(Draft *draft, PyObject *origin, PyObject *parent)
{
    draft->values[ORIGIN] = Py_XNewRef(origin);
    draft->values[PARENT] = parent;
    return parent == NULL ? -1 : 0;
}

/* The record of a listener as that of what it accepts; None where there is none. */
static PyObject *
parent_of_accepted(Recorder *self, PyObject *listener)
{
    PyObject *fd = PyObject_CallOneArg(self->parts[FILENO], listener);
    PyObject *record = fd == NULL ? NULL : look_up(self->parts[CREATIONS], fd);
    Py_XDECREF(fd);
    if (record == NULL) {
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
    }
    if (!refers_to(PyTuple_GET_ITEM(record, self->position[SOCK]), listener)) {
        Py_SETREF(record, Py_NewRef(Py_None));
    }
    else if (PyTuple_GET_ITEM(record, self->position[PARENT]) != Py_None) {
        Py_SETREF(record, PyObject_CallOneArg(self->parts[AS_PARENT], record));
    }
    return record;
}

/* The origin as Python finds it. */
static int
ask_origin(Recorder *self, Draft *draft)
{
    PyObject *found = PyObject_CallFunctionObjArgs(self->parts[ORIGIN_OF], draft->fd, draft->caller,
                                                   self->parts[CREATIONS], self->parts[DETACHED], NULL);
    if (found == NULL) {
        return -1;
    }
    int failed = -1;
    if (PyTuple_Check(found) && PyTuple_GET_SIZE(found) == 2) {
        failed = put_origin(draft, PyTuple_GET_ITEM(found, 0), Py_NewRef(PyTuple_GET_ITEM(found, 1)));
    }
    else {
        PyErr_SetString(PyExc_TypeError, "an origin and a parent were expected");
    }
    Py_DECREF(found);
    return failed;
}

/* How the socket came about, and the record of what it was made of. */
static int
find_origin(Recorder *self, Draft *draft)
{
    if (draft->descriptor == Py_None) {
        return put_origin(draft, self->parts[CREATED], Py_NewRef(Py_None));
    }
    PyObject *code = (PyObject *)PyFrame_GetCode(draft->caller);
    Py_DECREF(code);
    PyObject *listener = NULL;
    if (code == self->parts[ACCEPT_CODE]) {
        listener = look_up(self->parts[LISTENERS], draft->thread_id);
        if (listener == NULL && PyErr_Occurred()) {
            return -1;
        }
    }
    if (listener == NULL) {
        return ask_origin(self, draft);
    }
    int failed = put_origin(draft, self->parts[ACCEPTED], parent_of_accepted(self, listener));
    Py_DECREF(listener);
    return failed;
}

/* Find the values of all fields. The serial is counted late, so that what fails before leaves no
   gap. */
static int
fill_in(Recorder *self, Draft *draft)
{
    PyObject **values = draft->values, *callback = self->parts[REFERENCE_CALLBACK];
    if (find_origin(self, draft) < 0 || (values[THREAD] = name_of_thread(self, draft)) == NULL) {
        return -1;
    }
    if ((values[SERIAL] = PyLong_FromLongLong(++self->counted)) == NULL ||
        (values[STACK] = capture(draft->caller, self->depth, self->parts[ENDS])) == NULL ||
        (values[SOCK] = PyWeakref_NewRef(draft->sock, callback == Py_None ? NULL : callback)) == NULL ||
        (values[OBJECT_ID] = PyLong_FromVoidPtr(draft->sock)) == NULL ||
        (values[PID] = PyLong_FromLongLong(self->pid)) == NULL ||
        (values[OPENED_AT] = wall_time()) == NULL ||
        (values[TASK] = name_of_task(self, draft)) == NULL ||
        (values[LABELS] = current_labels(self)) == NULL ||
        (values[CONTEXT] = answer_of_provider(self)) == NULL) {
        return -1;
    }
    return 0;
}

/* A record of the values, whose references it takes. */
static PyObject *
as_record(Recorder *self, PyObject **values)
{
    PyObject *record = PyTuple_New(FIELD_COUNT);
    if (record != NULL) {
        for (int field = 0; field < FIELD_COUNT; field++) {
            PyTuple_SET_ITEM(record, self->position[field], values[field]);
            values[field] = NULL;
        }
    }
    return record;
}

static PyObject *
make_record(Recorder *self, Draft *draft)
{
    PyObject *record = NULL;
    draft->caller = frame_of_caller();
    draft->thread_id = PyLong_FromUnsignedLong(PyThread_get_thread_ident());
    if (draft->caller != NULL && draft->thread_id != NULL && fill_in(self, draft) == 0) {
        record = as_record(self, draft->values);
    }
    Py_XDECREF(draft->caller);
    Py_XDECREF(draft->thread_id);
    if (record == NULL) {
        for (int field = 0; field < FIELD_COUNT; field++) {
            Py_XDECREF(draft->values[field]);
        }
    }
    return record;
}

/* Make the stacks of the sockets that live on small, where it is time. */
static int
intern_stacks(Recorder *self)
{
    if (self->last_serial < self->intern_at) {
        return 0;
    }
    /* As many creations lie between two times as there are sockets: each pays next to nothing. */
    long long sockets = PyDict_GET_SIZE(self->parts[CREATIONS]);
    self->intern_at = self->last_serial + (sockets > self->intern_after ? sockets : self->intern_after);
    PyObject *done = PyObject_CallOneArg(self->parts[INTERN_STACKS], self->parts[CREATIONS]);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

PyDoc_STRVAR(on_create_doc, "on_create(sock, descriptor, /)\n--\n\n"
                            "Record a socket that was created; `descriptor` is what it was made of, or None.");

static PyObject *
on_create(PyObject *op, PyObject *const *args, Py_ssize_t count)
{
    Recorder *self = (Recorder *)op;
    if (count != 2) {
        PyErr_Format(PyExc_TypeError, "on_create() takes 2 arguments, not %zd", count);
        return NULL;
    }
    Draft draft = {.sock = args[0], .descriptor = args[1]};
    draft.fd = PyLong_CheckExact(args[1]) ? Py_NewRef(args[1])
                                          : PyObject_CallOneArg(self->parts[FILENO], args[0]);
    if (draft.fd == NULL) {
        return NULL;
    }
    PyObject *record = make_record(self, &draft);
    int failed = record == NULL || PyDict_SetItem(self->parts[CREATIONS], draft.fd, record) < 0;
    Py_DECREF(draft.fd);
    if (!failed) {
        self->last_serial = PyLong_AsLongLong(PyTuple_GET_ITEM(record, self->position[SERIAL]));
        failed = intern_stacks(self) < 0;
    }
    Py_XDECREF(record);
    if (failed) {
        return NULL;
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(count_doc, "count()\n--\n\nThe number of an event: one more than that of the last.");

static PyObject *
count_event(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    return PyLong_FromLongLong(++((Recorder *)op)->counted);
}

/* Find the place of each field in the order that is given. */
static int
place_fields(Recorder *self, PyObject *order)
{
    if (PyTuple_GET_SIZE(order) != FIELD_COUNT) {
        PyErr_Format(PyExc_ValueError, "%d fields are known, not %zd", FIELD_COUNT, PyTuple_GET_SIZE(order));
        return -1;
    }
    for (int field = 0; field < FIELD_COUNT; field++) {
        PyObject *name = PyUnicode_FromString(field_names[field]);
        if (name == NULL) {
            return -1;
        }
        self->position[field] = PySequence_Index(order, name);
        Py_DECREF(name);
        if (self->position[field] < 0) {
            return -1;
        }
    }
    return 0;
}

static int
check_kind(PyObject *labels)
{
    if (PyContextVar_CheckExact(labels)) {
        return 0;
    }
    PyErr_SetString(PyExc_TypeError, "labels must be a context variable");
    return -1;
}

static int
init_recorder(Recorder *self, PyObject *args, PyObject *kwargs)
{
    static char *keywords[] = {
        "fields",   "depth",   "pid",       "intern_after", "creations", "detached", "listeners", "threads",
        "modules",  "ends",    "fileno",    "reference_callback",     "labels",   "provider",  "fallback_provider",
        "no_context", "created", "accepted", "accept_code", "as_parent", "origin_of", "note_task", "exact_text",
        "intern_stacks", NULL,
    };
    PyObject *order, *parts[PART_COUNT];
    if (!PyArg_ParseTupleAndKeywords(
            args, kwargs, "O!nLLO!O!O!O!O!O!OOOOOOOOOOOOOO:Recorder", keywords, &PyTuple_Type, &order,
            &self->depth, &self->pid, &self->intern_after, &PyDict_Type, &parts[CREATIONS], &PyDict_Type, &parts[DETACHED],
            &PyDict_Type, &parts[LISTENERS], &PyDict_Type, &parts[THREADS], &PyDict_Type, &parts[MODULES],
            &PyTuple_Type, &parts[ENDS], &parts[FILENO], &parts[REFERENCE_CALLBACK],
            &parts[LABELS_VARIABLE], &parts[PROVIDER], &parts[FALLBACK_PROVIDER],
            &parts[NO_CONTEXT], &parts[CREATED], &parts[ACCEPTED], &parts[ACCEPT_CODE],
            &parts[AS_PARENT], &parts[ORIGIN_OF], &parts[NOTE_TASK], &parts[EXACT_TEXT],
            &parts[INTERN_STACKS]) ||
        check_kind(parts[LABELS_VARIABLE]) < 0 || place_fields(self, order) < 0) {
        return -1;
    }
    self->intern_at = self->intern_after;
    for (int part = 0; part < PART_COUNT; part++) {
        self->parts[part] = Py_NewRef(parts[part]);
    }
    for (int name = 0; name < NAME_COUNT; name++) {
        self->names[name] = PyUnicode_InternFromString(name_texts[name]);
        if (self->names[name] == NULL) {
            return -1;
        }
    }
    return 0;
}

/* In place of `__init__`, so that no recorder changes while it is used. */
static PyObject *
new_recorder(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *recorder = type->tp_alloc(type, 0);
    if (recorder != NULL && init_recorder((Recorder *)recorder, args, kwargs) < 0) {
        Py_CLEAR(recorder);
    }
    return recorder;
}

static int
traverse_recorder(PyObject *op, visitproc visit, void *arg)
{
    Recorder *self = (Recorder *)op;
    Py_VISIT(Py_TYPE(op));
    for (int part = 0; part < PART_COUNT; part++) {
        Py_VISIT(self->parts[part]);
    }
    return 0;
}

static void
free_recorder(PyObject *op)
{
    Recorder *self = (Recorder *)op;
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    for (int part = 0; part < PART_COUNT; part++) {
        Py_XDECREF(self->parts[part]);
    }
    for (int name = 0; name < NAME_COUNT; name++) {
        Py_XDECREF(self->names[name]);
    }
    type->tp_free(op);
    Py_DECREF(type);
}

static PyMethodDef recorder_methods[] = {
    {"on_create", (PyCFunction)(void (*)(void))on_create, METH_FASTCALL, on_create_doc},
    {"count", count_event, METH_NOARGS, count_doc},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef recorder_members[] = {
    {"pid", T_LONGLONG, offsetof(Recorder, pid), 0, "The process in which sockets are created."},
    {"last_serial", T_LONGLONG, offsetof(Recorder, last_serial), READONLY, "That of the latest creation."},
    {NULL, 0, 0, 0, NULL},
};

PyDoc_STRVAR(recorder_doc, "Writes a record of each socket that is created into a table.");

/* Without `tp_clear`, as a tuple: its references never change, so any cycle also goes through an
   object that has one. */
static PyType_Slot recorder_slots[] = {
    {Py_tp_doc, (void *)recorder_doc},
    {Py_tp_new, (void *)new_recorder},
    {Py_tp_dealloc, (void *)free_recorder},
    {Py_tp_traverse, (void *)traverse_recorder},
    {Py_tp_methods, recorder_methods},
    {Py_tp_members, recorder_members},
    {0, NULL},
};

static PyType_Spec recorder_spec = {
    .name = "closewait_guard._capture._speedups.Recorder",
    .basicsize = sizeof(Recorder),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = recorder_slots,
};

/* The finalizer of the socket class. */

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *fileno;
    PyObject *notify;
    PyObject *original;
    char is_for_open_only;
} Finalizer;

/* Whether a socket is closed; no exception is left. */
static int
is_closed(Finalizer *self, PyObject *sock)
{
    PyObject *fd = PyObject_CallOneArg(self->fileno, sock);
    long number = fd == NULL ? 0 : PyLong_AsLong(fd);
    Py_XDECREF(fd);
    PyErr_Clear();
    return number < 0;
}

/* Notify of a socket that is open; then call the finalizer that was there. What is raised while
   notifying is dropped: nothing that a finalizer raises reaches the program. */
static PyObject *
finalize(PyObject *op, PyObject *const *args, size_t flags, PyObject *keywords)
{
    Finalizer *self = (Finalizer *)op;
    if (PyVectorcall_NARGS(flags) != 1 || keywords != NULL) {
        PyErr_SetString(PyExc_TypeError, "__del__() takes the socket alone");
        return NULL;
    }
    if (is_closed(self, args[0])) {
        if (self->is_for_open_only) {
            Py_RETURN_NONE;
        }
    }
    else {
        PyObject *done = PyObject_CallOneArg(self->notify, args[0]);
        Py_XDECREF(done);
        PyErr_Clear();
    }
    return PyObject_CallOneArg(self->original, args[0]);
}

static PyObject *
new_finalizer(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keywords[] = {"fileno", "notify", "original", "is_for_open_only", NULL};
    PyObject *fileno, *notify, *original;
    int is_for_open_only;
    if (!PyArg_ParseTupleAndKeywords(
            args, kwargs, "OOOp:Finalizer", keywords, &fileno, &notify, &original, &is_for_open_only)) {
        return NULL;
    }
    Finalizer *self = (Finalizer *)type->tp_alloc(type, 0);
    if (self != NULL) {
        self->vectorcall = finalize;
        self->fileno = Py_NewRef(fileno);
        self->notify = Py_NewRef(notify);
        self->original = Py_NewRef(original);
        self->is_for_open_only = (char)is_for_open_only;
    }
    return (PyObject *)self;
}

static PyObject *
bind_finalizer(PyObject *op, PyObject *sock, PyObject *Py_UNUSED(type))
{
    return sock == NULL || sock == Py_None ? Py_NewRef(op) : PyMethod_New(op, sock);
}

static int
traverse_finalizer(PyObject *op, visitproc visit, void *arg)
{
    Finalizer *self = (Finalizer *)op;
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->fileno);
    Py_VISIT(self->notify);
    Py_VISIT(self->original);
    return 0;
}

static void
free_finalizer(PyObject *op)
{
    Finalizer *self = (Finalizer *)op;
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    Py_XDECREF(self->fileno);
    Py_XDECREF(self->notify);
    Py_XDECREF(self->original);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyMemberDef finalizer_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(Finalizer, vectorcall), READONLY, NULL},
    {"__wrapped__", T_OBJECT_EX, offsetof(Finalizer, original), READONLY, "The finalizer that was there."},
    {NULL, 0, 0, 0, NULL},
};

PyDoc_STRVAR(finalizer_doc, "Notifies of sockets that are finalized while open; then calls the finalizer "
                            "that was there.");

static PyType_Slot finalizer_slots[] = {
    {Py_tp_doc, (void *)finalizer_doc},
    {Py_tp_new, (void *)new_finalizer},
    {Py_tp_dealloc, (void *)free_finalizer},
    {Py_tp_traverse, (void *)traverse_finalizer},
    {Py_tp_call, (void *)PyVectorcall_Call},
    {Py_tp_descr_get, (void *)bind_finalizer},
    {Py_tp_members, finalizer_members},
    {0, NULL},
};

/* As a function it is bound without an object for each call. */
static PyType_Spec finalizer_spec = {
    .name = "closewait_guard._capture._speedups.Finalizer",
    .basicsize = sizeof(Finalizer),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_HAVE_VECTORCALL |
             Py_TPFLAGS_METHOD_DESCRIPTOR,
    .slots = finalizer_slots,
};

static int
add_type(PyObject *module, PyType_Spec *spec)
{
    PyObject *type = PyType_FromModuleAndSpec(module, spec, NULL);
    if (type == NULL) {
        return -1;
    }
    int failed = PyModule_AddType(module, (PyTypeObject *)type);
    Py_DECREF(type);
    return failed;
}

static int
fill_module(PyObject *module)
{
    return add_type(module, &recorder_spec) < 0 || add_type(module, &finalizer_spec) < 0 ? -1 : 0;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, (void *)fill_module},
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED},
#endif
    /* Whether it works without the GIL has not been proved. */
#if PY_VERSION_HEX >= 0x030D0000
    {Py_mod_gil, Py_MOD_GIL_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "closewait_guard._capture._speedups",
    .m_doc = "What happens at each creation and at each end of a socket, in C.",
    .m_slots = module_slots,
};

PyMODINIT_FUNC
PyInit__speedups(void)
{
    return PyModuleDef_Init(&module_definition);
}
