/* Public functions of the interpreter in C that Python code cannot call; ctypes can, and takes
   milliseconds and half a megabyte to load. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#ifndef _WIN32
#include <dlfcn.h>
#endif

static PyObject *
own_interpreter(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return PyLong_FromVoidPtr(PyInterpreterState_Get());
}

static PyObject *
main_interpreter(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return PyLong_FromVoidPtr(PyInterpreterState_Main());
}

static PyObject *
newest_interpreter(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return PyLong_FromVoidPtr(PyInterpreterState_Head());
}

static int
ask(void *object)
{
    return PyObject_IsTrue(object) < 0 ? -1 : 0;
}

static PyObject *
ask_soon(PyObject *module, PyObject *object)
{
    (void)module;
    return PyBool_FromLong(Py_AddPendingCall(ask, object) == 0);
}

static PyObject *
keep_library(PyObject *module, PyObject *name)
{
    (void)module;
    const char *text = PyUnicode_AsUTF8(name);
    if (text == NULL) {
        return NULL;
    }
#ifndef _WIN32
    dlopen(text, RTLD_NOW);
#endif
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"own", own_interpreter, METH_NOARGS, "The address of the interpreter of this thread."},
    {"main", main_interpreter, METH_NOARGS, "The address of the main interpreter."},
    {"newest", newest_interpreter, METH_NOARGS, "The address of the newest interpreter."},
    {"ask_soon", ask_soon, METH_O,
     "Have the truth of an object asked for between two bytecodes of the main thread."},
    {"keep_library", keep_library, METH_O, "Load a library of the system for good, if it is there."},
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
    .m_name = "closewait_guard._cpython._calls",
    .m_doc = "Public functions of the interpreter in C that Python code cannot call.",
    .m_methods = methods,
    .m_slots = module_slots,
};

PyMODINIT_FUNC
PyInit__calls(void)
{
    return PyModuleDef_Init(&module_definition);
}
