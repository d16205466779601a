/* The python of a virtual environment, built with the sanitizer's runtime; why, see lua_host.c. */
#include <Python.h>

int main(int argc, char **argv) { return Py_BytesMain(argc, argv); }
