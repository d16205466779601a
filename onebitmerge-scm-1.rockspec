rockspec_format = "3.0"
package = "onebitmerge"
version = "scm-1"
source = { url = "." }   -- built from a checkout: luarocks make
description = {
  summary = "1-bit task vectors, routed merging and CPU inference of fine-tuned LLMs",
  detailed = [[
    Stores each fine-tune of a base language model as one bit per weight, decides per request which task it is, and runs the
    base plus that task vector, with the others TIES-merged in.  Also static merges by mergekit's recipes.
    Needs OpenBLAS, hwloc, jansson, PCRE2, utf8proc, libyaml and xxHash (tests/deps.sh has Debian's names).
  ]],
  license = "Apache-2.0",
}
dependencies = { "lua >= 5.4, < 5.5" }
build = {
  type = "cmake",
  variables = {
    CMAKE_BUILD_TYPE = "Release",
    CMAKE_C_FLAGS = "$(CFLAGS)",
    LUA_INCDIR = "$(LUA_INCDIR)",
    OBM_LUA = "ON",
    OBM_INSTALL = "OFF",
    OBM_LUA_LIBDIR = "$(LIBDIR)",
    OBM_LUA_LUADIR = "$(LUADIR)",
  },
}
test = { type = "command", command = "lua5.4 /usr/bin/busted tests/lua" }
