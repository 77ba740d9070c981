package trace

import (
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/nftrace/nftrace/bpf"
)

// handmade is the type information of modules that some groups need and the kernel does not have.
func (t *Tracer) handmade(gs []group, types *btf.Cache) (specs []*btf.Spec, err error) {
	typed := func(module string) bool {
		return slices.ContainsFunc(gs, func(g group) bool { return g.typed && g.module == module })
	}
	for _, module := range []string{nftModule, ebtModule} {
		var spec *btf.Spec
		switch {
		case !typed(module):
		case t.unknown(module):
			spec, err = handmadeTypes(module)
		case module == nftModule:
			if spec, err = t.modules.types(module, types); err == nil {
				spec, err = oldRule(spec)
			}
		}
		if err != nil {
			return nil, err
		}
		if spec != nil {
			specs = append(specs, spec)
		}
	}
	if slices.ContainsFunc(gs, func(g group) bool { return g.module == xtModule }) && knownXT(types) == nil {
		spec, err := handmadeXT()
		if err != nil {
			return nil, err
		}
		specs = append(specs, spec)
	}
	return specs, nil
}

// unknown tells whether a module's structs are those that handmadeTypes has, for it has no type
// information, as all modules of an old kernel; what is built in has.
func (t *Tracer) unknown(module string) bool { return t.byHand && !t.modules.builtIn[module] }

// xtTypes has struct xt_table and xt_table_info of module x_tables.
func xtTypes(types *btf.Cache) (*btf.Spec, error) {
	if spec := knownXT(types); spec != nil {
		return spec, nil
	}
	return handmadeXT()
}

// knownXT is the first type information of the kernel's that has them: of x_tables itself, of the
// kernel, or of a module that uses it; nil if there is none.
func knownXT(types *btf.Cache) *btf.Spec {
	const kernel = "vmlinux"
	others, _ := types.Modules() // none: the kernel has no type information of modules
	for _, name := range append([]string{xtModule, kernel}, others...) {
		read := func() (*btf.Spec, error) { return types.Module(name) }
		if name == kernel {
			read = types.Kernel
		}
		spec, err := read()
		var table, info *btf.Struct
		if err == nil && spec.TypeByName("xt_table", &table) == nil && spec.TypeByName("xt_table_info", &info) == nil {
			return spec
		}
	}
	return nil
}

// handmadeXT are those structs as kernels since Linux 5.15 have them. If a kernel has them
// otherwise, its tables have names that nobody knows, and are unresolved.
func handmadeXT() (*btf.Spec, error) {
	u8 := &btf.Int{Name: "unsigned char", Size: 1}
	u32 := &btf.Int{Name: "unsigned int", Size: 4}
	ptr := &btf.Pointer{Target: (*btf.Void)(nil)}
	list := &btf.Struct{Name: "list_head", Size: 16, Members: []btf.Member{at("next", ptr, 0), at("prev", ptr, 8)}}
	chars := &btf.Array{Type: &btf.Int{Name: "char", Size: 1, Encoding: btf.Char}, Index: u32, Nelems: 32}
	b, err := btf.NewBuilder([]btf.Type{
		&btf.Struct{Name: "xt_table", Size: 88, Members: []btf.Member{
			at("list", list, 0), at("valid_hooks", u32, 16), at("private", ptr, 24), at("af", u8, 48), at("name", chars, 56),
		}},
		&btf.Struct{Name: "xt_table_info", Size: 64, Members: []btf.Member{
			at("size", u32, 0), at("number", u32, 4), at("entries", &btf.Array{Type: u8, Index: u32}, 64),
		}},
	}, nil)
	if err != nil {
		return nil, err
	}
	return b.Spec()
}

// at is a struct's member at an offset in bytes.
func at(name string, typ btf.Type, offset btf.Bits) btf.Member {
	return btf.Member{Name: name, Type: typ, Offset: 8 * offset}
}

// oldRule has the handle of module nf_tables' struct nft_rule as that of a struct nft_rule_dp, by
// which the probes know it and which took its place in Linux 5.17; nil where there is
// one.
func oldRule(spec *btf.Spec) (*btf.Spec, error) {
	var rule *btf.Struct
	if spec.TypeByName("nft_rule_dp", &rule) == nil {
		return nil, nil
	}
	if err := spec.TypeByName("nft_rule", &rule); err != nil {
		return nil, fmt.Errorf("type information of module %s: %w", nftModule, err)
	}
	old := &btf.Struct{Name: "nft_rule_dp", Size: rule.Size}
	for _, m := range rule.Members {
		if m.Name == "handle" {
			m.Type = &btf.Int{Name: "unsigned long", Size: 8}
			old.Members = append(old.Members, m)
		}
	}
	b, err := btf.NewBuilder([]btf.Type{old}, nil)
	if err != nil {
		return nil, err
	}
	return b.Spec()
}

// handmadeTypes are those structs of modules nf_tables and ebtables that the probes read, as
// kernels before type information of modules (5.11) have them: include/net/netfilter/nf_tables.h
// and include/linux/netfilter_bridge/ebtables.h of Linux 5.10, on 64-bit machines. For a rule see
// oldRule.
func handmadeTypes(module string) (*btf.Spec, error) {
	u8 := &btf.Int{Name: "unsigned char", Size: 1}
	u16 := &btf.Int{Name: "unsigned short", Size: 2}
	u32 := &btf.Int{Name: "unsigned int", Size: 4}
	u64 := &btf.Int{Name: "unsigned long", Size: 8}
	boolean := &btf.Int{Name: "_Bool", Size: 1, Encoding: btf.Bool}
	ptr := &btf.Pointer{Target: (*btf.Void)(nil)}
	chain := &btf.Struct{Name: "nft_chain", Size: 104, Members: []btf.Member{
		at("table", ptr, 64), at("handle", u64, 72), at("name", ptr, 88),
	}}
	list := &btf.Struct{Name: "list_head", Size: 16, Members: []btf.Member{at("next", ptr, 0), at("prev", ptr, 8)}}
	chars := &btf.Array{Type: &btf.Int{Name: "char", Size: 1, Encoding: btf.Char}, Index: u32, Nelems: 32}
	counter := &btf.Struct{Name: "ebt_counter", Size: 16, Members: []btf.Member{at("pcnt", u64, 0), at("bcnt", u64, 8)}}
	structs := map[string][]btf.Type{nftModule: {
		chain,
		&btf.Struct{Name: "nft_base_chain", Size: 184, Members: []btf.Member{
			at("policy", u8, 64), at("chain", chain, 80),
		}},
		&btf.Struct{Name: "nft_table", Size: 256, Members: []btf.Member{
			at("handle", u64, 224), {Name: "family", Type: u16, Offset: 8 * 236, BitfieldSize: 6}, at("name", ptr, 240),
		}},
		&btf.Struct{Name: "nft_rule_dp", Size: 24, Members: []btf.Member{
			{Name: "handle", Type: u64, Offset: 8 * 16, BitfieldSize: 42},
		}},
		&btf.Struct{Name: "nft_verdict", Size: 16, Members: []btf.Member{
			at("code", u32, 0), at("chain", ptr, 8),
		}},
		&btf.Struct{Name: "nft_pktinfo", Size: 48, Members: []btf.Member{at("skb", ptr, 0)}},
		&btf.Struct{Name: "nft_traceinfo", Size: 48, Members: []btf.Member{
			at("pkt", ptr, 0), at("basechain", ptr, 8), at("rule", ptr, 24), at("verdict", ptr, 32), at("trace", boolean, 45),
		}},
	}, ebtModule: {
		&btf.Struct{Name: "ebt_table", Size: 96, Members: []btf.Member{
			at("list", list, 0), at("name", chars, 16), at("private", ptr, 72),
		}},
		&btf.Struct{Name: "ebt_replace", Size: 120, Members: []btf.Member{at("name", chars, 0)}},
		&btf.Struct{Name: "ebt_table_info", Size: 128, Members: []btf.Member{
			at("nentries", u32, 4), at("counters", &btf.Array{Type: counter, Index: u32}, 128),
		}},
	}}
	b, err := btf.NewBuilder(structs[module], nil)
	if err != nil {
		return nil, err
	}
	return b.Spec()
}

// errUnknownNFT is returned where the structs of nf_tables are not what is known of them.
var errUnknownNFT = errors.New("this kernel has no type information of it, and its structs are not those that nftrace knows")

// learnNFT finds out where in struct nftables_pernet the lock of transactions and the number of
// the generation are, which differs between point releases: in a namespace of our own we know
// what they are.
func (t *Tracer) learnNFT(k *nftKey, look *ebpf.Program) error {
	var seqs []uint32 // offsets that may be
	var l bpf.NftraceNftLooked
	for i := range 4 {
		if i > 0 {
			if err := k.addRule(); err != nil {
				return err
			}
		}
		gen, err := k.generation()
		if err != nil {
			return err
		}
		if err := ran(look.Run(nil)); err != nil {
			return fmt.Errorf("look at the state of nf_tables: %w", err)
		}
		if err := t.vars[bpf.NftraceVarNftLooked].Get(&l); err != nil {
			return err
		}
		had := seqs
		seqs = nil
		for off := range uint32(8 * len(l.Words)) {
			if off%4 == 0 && uint32(l.Words[off/8]>>(off%8*8)) == gen && (i == 0 || slices.Contains(had, off)) {
				seqs = append(seqs, off)
			}
		}
	}
	lock, ok := mutexAt(l.At, l.Words[:])
	if len(seqs) != 1 || !ok || l.Family != unix.AF_INET || cString(l.Name[:]) != keyTable {
		return errUnknownNFT
	}
	return t.setVars(map[string]any{bpf.NftraceVarNftLock: lock, bpf.NftraceVarNftSeq: seqs[0]})
}

// mutexAt finds a struct mutex that nobody holds in memory: no owner, no lock of the list of
// those who wait, and the list is empty (include/linux/mutex.h).
func mutexAt(at uint64, words []uint64) (offset uint32, ok bool) {
	for i := 0; i+3 < len(words); i++ {
		list := at + 8*uint64(i+2)
		if words[i] == 0 && words[i+1] == 0 && words[i+2] == list && words[i+3] == list {
			return uint32(8 * i), true
		}
	}
	return 0, false
}
