/* lua5.4 SCRIPT ARG..., built with the sanitizer's runtime: preloading TSan's into an ordinary program also puts it into the
 * shells that the program starts, and those crash. */
#include <lauxlib.h>
#include <lualib.h>
#include <stdio.h>

static void set_arguments(lua_State *L, int argc, char **argv) {
    lua_createtable(L, argc - 2, 2);
    for (int i = 0; i < argc; i++) {
        lua_pushstring(L, argv[i]);
        lua_rawseti(L, -2, i - 1);
    }
    lua_setglobal(L, "arg");
}

int main(int argc, char **argv) {
    lua_State *L = luaL_newstate();
    if (argc < 2 || !L) return 2;
    luaL_openlibs(L);
    set_arguments(L, argc, argv);
    int failed = luaL_loadfile(L, argv[1]) || lua_pcall(L, 0, 0, 0);
    if (failed) fprintf(stderr, "%s\n", lua_tostring(L, -1));
    lua_close(L);
    return failed;
}
