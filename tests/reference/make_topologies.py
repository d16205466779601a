"""Writes tests/vectors/topologies: machines in hwloc's XML, from synthetic descriptions (lstopo-no-graphics of the package hwloc-nox)
and edits that no description can express.  Run it by hand; the files are committed.
"""

import pathlib
import re
import subprocess

OUT = pathlib.Path(__file__).resolve().parents[1] / "vectors" / "topologies"
GIB = 1 << 30


def lstopo(description, *options):
    text = subprocess.run(["lstopo-no-graphics", "--input", description, "--no-caches", "--no-io", "--of", "xml", *options, "-"],
                          check=True, capture_output=True, text=True).stdout
    text = re.sub(r'\s*<info name="(ProcessName|hwlocVersion|SyntheticDescription)".*?/>', "", text)
    text = re.sub(r"\s*<page_type.*?/>", "", text)
    return re.sub(r'(<object type="NUMANode"[^>]*[^/])>\s*</object>', r"\1/>", text)


def write(name, text):
    (OUT / name).write_text(text, encoding="utf-8")


def main():
    two = lstopo(f"package:2 [numa(memory={256 * GIB})] core:4 pu:2")
    write("two-sockets.xml", two)
    write("four-nodes.xml", lstopo(f"package:1 numa:4(memory={64 * GIB}) core:3 pu:1"))
    # A cgroup or taskset that leaves cores 0-5 of 8, both threads each: 4 cores of the first node, 2 of the second.
    write("uneven.xml", lstopo(f"package:2 [numa(memory={256 * GIB})] core:4 pu:2", "--restrict", "0x00000fff"))
    # Sets of a cgroup as systems report them, on a machine that is there whole: cpuset.cpus leaves the second thread of core 1, both of
    # core 3 and one of core 4; cpuset.mems leaves the second node to all cores.
    assert two.count('allowed_cpuset="0x0000ffff"') == two.count('allowed_nodeset="0x00000003"') == 1
    write("cpuset.xml", two.replace('allowed_cpuset="0x0000ffff"', 'allowed_cpuset="0x000001c8"'))
    write("mems.xml", two.replace('allowed_nodeset="0x00000003"', 'allowed_nodeset="0x00000002"'))
    second = two.rindex(f'local_memory="{256 * GIB}"')
    write("memoryless.xml", two[:second] + 'local_memory="0"' + two[second + len(f'local_memory="{256 * GIB}"'):])
    # CXL memory: a node of its own that no core belongs to.
    node = (f'    <object type="NUMANode" os_index="2" cpuset="0x0" complete_cpuset="0x0" nodeset="0x00000004" complete_nodeset="0x00000004" '
            f'gp_index="900" local_memory="{512 * GIB}"/>\n')
    first = two.index('    <object type="Package"')
    cxl = two[:first] + node + two[first:]
    write("cxl.xml", re.sub(r'(type="Machine".*?nodeset=)"0x00000003"( complete_nodeset=)"0x00000003"( allowed_nodeset=)"0x00000003"',
                            r'\1"0x00000007"\2"0x00000007"\3"0x00000007"', cxl, count=1))
    # High-bandwidth memory beside DRAM: two nodes for the cores of each package.
    write("hbm.xml", lstopo(f"package:2 [numa(memory={256 * GIB})] [numa(memory={64 * GIB})] core:2 pu:1"))
    # Cores 0-1 at 5000 MHz, 2-7 at 2500 MHz, on two nodes.
    kinds = ('  <cpukind cpuset="0x000000fc" forced_efficiency="0"><info name="FrequencyMaxMHz" value="2500"/></cpukind>\n'
             '  <cpukind cpuset="0x00000003" forced_efficiency="1"><info name="FrequencyMaxMHz" value="5000"/></cpukind>\n')
    write("hybrid.xml", lstopo(f"numa:2(memory={32 * GIB}) core:4 pu:1").replace("</topology>", kinds + "</topology>"))


main()
