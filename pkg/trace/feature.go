package trace

import (
	"errors"
	"fmt"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
)

// feature is something of the kernel's without which fentry probes cannot be loaded.
type feature struct {
	name  string
	since string // the Linux that brought it
	// probe asks the kernel: nil if it has the feature, ebpf.ErrNotSupported if
	// not; any other error says nothing.
	probe func() error
}

// needed is what fentry probes need, oldest first.
var needed = []feature{
	{"type information of modules", "5.11", haveModuleBTF},
	{"atomic operations that return the old value", "5.12", haveAtomicFetch},
	{"BPF programs of type syscall", "5.14", func() error { return features.HaveProgramType(ebpf.Syscall) }},
	{"bpf_kallsyms_lookup_name", "5.16", func() error { return features.HaveProgramHelper(ebpf.Syscall, asm.FnKallsymsLookupName) }},
	{"bpf_loop", "5.17", func() error { return features.HaveProgramHelper(ebpf.Kprobe, asm.FnLoop) }},
}

// lacking names what the kernel lacks of what fentry probes need; "" if nothing. The programs
// that ask count against the limit of locked memory, as all others do.
func lacking() string {
	if missing := lacks(needed); missing != "" {
		return missing
	}
	return refusedByKernel()
}

// lacks names the features that the kernel does not have; "" if none.
func lacks(needed []feature) string {
	var missing []string
	for _, f := range needed {
		if errors.Is(f.probe(), ebpf.ErrNotSupported) {
			missing = append(missing, fmt.Sprintf("%s (in Linux %s and newer)", f.name, f.since))
		}
	}
	return strings.Join(missing, ", ")
}

// haveModuleBTF looks for what CONFIG_DEBUG_INFO_BTF_MODULES adds to struct module
// (include/linux/module.h); whether a module is loaded that has type information or not.
func haveModuleBTF() error {
	spec, err := btf.LoadKernelSpec()
	if err != nil {
		return err
	}
	var module *btf.Struct
	if err := spec.TypeByName("module", &module); err != nil {
		return err
	}
	if _, err := offsetOf(module, "btf_data"); err != nil {
		return ebpf.ErrNotSupported
	}
	return nil
}

// haveAtomicFetch loads a program with such an operation. The verifier of a kernel without
// it does not know the instruction.
func haveAtomicFetch() error {
	fetch := asm.FetchAdd.Mem(asm.RFP, asm.R1, asm.DWord, -8)
	fetch.Constant = int64(asm.FetchAdd >> 8) // the library (0.22) writes it only from here
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SocketFilter,
		Instructions: asm.Instructions{
			asm.Mov.Imm(asm.R1, 0),
			asm.StoreMem(asm.RFP, -8, asm.R1, asm.DWord),
			fetch,
			asm.Mov.Imm(asm.R0, 0),
			asm.Return(),
		},
		License: "GPL",
	})
	var refused *ebpf.VerifierError
	switch {
	case err == nil:
		return prog.Close()
	case errors.As(err, &refused):
		return ebpf.ErrNotSupported
	}
	return err
}

// LogsAE tells whether the kernel's log of a packet (nf_log_syslog) has the TCP flag AE.
func (t *Tracer) LogsAE() bool { return t.logsAE }

// knowsAE looks for the flag in struct tcphdr: one commit brought it there and to the log ("tcp:
// extend TCP flags to allow AE bit/ACE field", Linux 6.15).
func knowsAE(kernel *btf.Spec) bool {
	var tcphdr *btf.Struct
	if err := kernel.TypeByName("tcphdr", &tcphdr); err != nil {
		return false
	}
	_, err := offsetOf(tcphdr, "ae")
	return err == nil
}
