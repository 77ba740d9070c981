package trace

import (
	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
)

// kfuncs are the kernel's functions that probes call where they are there (bpf/compat.h).
var kfuncs = []string{"bpf_preempt_disable", "bpf_preempt_enable", "bpf_rdonly_cast"}

// dropLackedKfuncs makes the addresses of those that the kernel lacks 0, and takes out the calls,
// which the verifier finds dead then. The library does the same, but searches all modules for each
// single one: 200,000 system calls on Linux 6.1, and the types of all modules are read.
func dropLackedKfuncs(programs map[string]*ebpf.ProgramSpec, kernel *btf.Spec) {
	lacks := map[string]bool{}
	for _, name := range kfuncs {
		if lackedFunction(kernel, []string{name}) != "" {
			lacks[name] = true
		}
	}
	if len(lacks) == 0 {
		return
	}
	for _, p := range programs {
		for i := range p.Instructions {
			ins := &p.Instructions[i]
			if !lacks[ins.Reference()] {
				continue
			}
			instead := asm.Mov.Imm(asm.R0, 0)
			if !ins.IsKfuncCall() {
				instead = asm.LoadImm(ins.Dst, 0, asm.DWord)
			}
			instead = instead.WithSymbol(ins.Symbol()).WithSource(ins.Source())
			*ins = btf.WithFuncMetadata(instead, btf.FuncMetadata(ins))
		}
	}
}
