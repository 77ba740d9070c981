package trace

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf/btf"
)

// modules tells where functions and types of the kernel's modules are: in the module once it is
// loaded, or, where it is built in, in the kernel itself, whose type information knows them then.
type modules struct {
	dir     string          // /sys/module
	builtIn map[string]bool // that does not change
}

// functionOf is a function of each module that may be built in: one that others call, by its name or
// by a pointer, so that the compiler has made it a part of nobody.
var functionOf = map[string]string{
	xtModule:          "xt_replace_table",
	"ip_tables":       "ipt_do_table",
	"ip6_tables":      "ip6t_do_table",
	"arp_tables":      "arpt_do_table",
	"bridge":          "br_forward",
	"nf_defrag_ipv6":  "nf_ct_frag6_gather",
	"nf_nat":          "nf_nat_setup_info",
	nftModule:         "nft_do_chain",
	"nf_flow_table":   "nf_flow_offload_ip_hook",
	"nfnetlink_queue": "nfqnl_enqueue_packet",
	ebtModule:         "ebt_do_table",
	"ebtable_broute":  "ebtable_broute_init",
	"ebtable_filter":  "ebtable_filter_init",
	"ebtable_nat":     "ebtable_nat_init",
}

// findModules looks which modules are built in. /sys/module has only those of them that have
// parameters.
func findModules(dir string, kernel *btf.Spec) *modules {
	m := &modules{dir: dir, builtIn: map[string]bool{}}
	for name, function := range functionOf {
		var f *btf.Func
		if !m.loaded(name) && kernel.TypeByName(function, &f) == nil {
			m.builtIn[name] = true
		}
	}
	return m
}

// loaded tells whether a module is loaded.
func (m *modules) loaded(name string) bool {
	state, err := os.ReadFile(filepath.Join(m.dir, name, "initstate"))
	return err == nil && strings.TrimSpace(string(state)) == "live"
}

// has tells whether the kernel has a module's functions now; "" is the kernel itself.
func (m *modules) has(name string) bool { return name == "" || m.builtIn[name] || m.loaded(name) }

// types is the type information that knows a module's functions and structs.
func (m *modules) types(name string, types *btf.Cache) (*btf.Spec, error) {
	read := func() (*btf.Spec, error) { return types.Module(name) }
	if m.builtIn[name] {
		read = types.Kernel
	}
	spec, err := read()
	if err != nil {
		return nil, fmt.Errorf("read the type information of module %s: %w", name, err)
	}
	return spec, nil
}

// lacksTypes says that a module has no type information; "" if it does, or is in the kernel, which
// has.
func (m *modules) lacksTypes(name string) string {
	if name == "" || m.builtIn[name] {
		return ""
	}
	path := typesPath + "/" + name
	if _, err := os.Stat(path); err != nil {
		return fmt.Sprintf("module %s has no type information (%s is missing)", name, path)
	}
	return ""
}
