std = "lua54"
max_line_length = 140
exclude_files = { "**/*.d.lua" }
files["tests/lua"] = { std = "+busted" }
-- The command line's helper gives routers a print of their own: stdout carries its frames.
files["python/onebitmerge/lua_router.lua"] = { globals = { "print" } }
