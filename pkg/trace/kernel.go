package trace

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/nftrace/nftrace/bpf"
)

const (
	lockdownPath = "/sys/kernel/security/lockdown"
	procPath     = "/proc/self"
	kallsymsPath = "/proc/kallsyms"
	typesPath    = "/sys/kernel/btf"
	btfPath      = typesPath + "/vmlinux"
	modulesPath  = "/sys/module"
	kptrPath     = "/proc/sys/kernel/kptr_restrict"
	preemptPath  = "/sys/kernel/debug/sched/preempt"
)

// CheckKernel returns an error that names what keeps every probe from working on this
// machine, or for this user, before any is tried.
func CheckKernel() error {
	if os.Geteuid() != 0 {
		return errors.New("nftrace must be run as root: it attaches probes to the kernel and reads rulesets; try: sudo nftrace …")
	}
	if err := enoughFiles(); err != nil {
		return err
	}
	if _, err := os.Stat(procPath); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s is missing, for there is no procfs here; mount it (mount -t proc proc /proc)", procPath)
	}
	if _, err := os.Stat(btfPath); errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Stat("/sys/kernel"); err != nil {
			return fmt.Errorf("%s is missing, for there is no sysfs here; mount it (mount -t sysfs sysfs /sys)", btfPath)
		}
		return fmt.Errorf("kernel %s has no type information (%s is missing); nftrace needs a kernel built with CONFIG_DEBUG_INFO_BTF=y", kernelRelease(), btfPath)
	}
	if lockdownMode(lockdownPath) == "confidentiality" {
		return errors.New("the kernel is locked down (confidentiality), which forbids tracing; boot without lockdown=confidentiality")
	}
	return nil
}

// minFiles is how many files nftrace may have open at once: 173 were counted with kprobes, without
// ebtables and arptables.
const minFiles = 256

// enoughFiles tells it where the process may open too few. Go has raised the soft limit to the hard one.
// Asked beforehand, for libraries take the kernel's refusal for that of what they try.
func enoughFiles() error {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err == nil && l.Cur < minFiles {
		return fmt.Errorf("no more than %d files may be open at once, and nftrace needs %d; raise the limit (ulimit -n 1024)", l.Cur, minFiles)
	}
	return nil
}

// lockdownMode returns the mode in brackets of a file like
// "none [integrity] confidentiality"; "" where there is none.
func lockdownMode(path string) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	_, rest, ok := strings.Cut(string(data), "[")
	if !ok {
		return ""
	}
	mode, _, _ := strings.Cut(rest, "]")
	return mode
}

// errHidden says why the kernel shows no address of __per_cpu_offset. Where kernel.kptr_restrict, which is in the
// file at path, allows that (kernel/ksyms_common.c:kallsyms_show_value), only who lacks CAP_SYSLOG does not see
// it, or there is none: it is no function.
func errHidden(path string) error {
	if data, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(data)) < "2" {
		return errors.New("the kernel hides the addresses of its symbols, although this is root: it lacks CAP_SYSLOG, as in a container without --privileged, or the kernel lacks CONFIG_KALLSYMS_ALL")
	}
	return errors.New("the kernel hides the addresses of its symbols; set kernel.kptr_restrict to 0 or 1 (sysctl kernel.kptr_restrict=1)")
}

// kernelRelease is uname -r.
func kernelRelease() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

// hasIPv6 tells whether the kernel has IPv6 (ipv6.disable=1 leaves its functions there).
func hasIPv6() bool {
	_, err := os.Stat("/proc/sys/net/ipv6")
	return err == nil
}

// tasksPreempt tells whether tasks may preempt each other in the kernel: not where
// the kernel says that its preemption is "none" or "voluntary", or was built without any.
var tasksPreempt = sync.OnceValue(func() bool { return preemptible(preemptPath, kallsymsPath) })

func preemptible(modesPath, symbolsPath string) bool {
	if modes, err := os.ReadFile(modesPath); err == nil {
		return !bytes.Contains(modes, []byte("(none)")) && !bytes.Contains(modes, []byte("(voluntary)"))
	}
	// Only kernels that can change it have the file. kernel/sched/core.c has preempt_schedule
	// with CONFIG_PREEMPTION alone, schedule always.
	found, err := readKallsyms(symbolsPath, "schedule", "preempt_schedule")
	if err != nil {
		return true
	}
	_, all := found["schedule"]
	_, preempts := found["preempt_schedule"]
	return preempts || !all
}

// setSymbols gives the probes the addresses that they need. Those of modules are there only
// once they are loaded.
func (t *Tracer) setSymbols() error {
	if t.backend == Kprobe || t.kprobeSpec != nil {
		if err := t.readSymbols(kallsymsPath); err != nil {
			return err
		}
	}
	s, err := t.findSymbols()
	if err != nil {
		return fmt.Errorf("look the kernel's symbols up: %w", err)
	}
	if s.PerCpuOffset == 0 {
		return errHidden(kptrPath)
	}
	return t.setVars(map[string]any{
		bpf.NftraceVarSymPerCpuOffset: s.PerCpuOffset,
		bpf.NftraceVarSymPreemptCount: s.PreemptCount,
		bpf.NftraceVarSymPcpuHot:      s.PcpuHot,
		bpf.NftraceVarSymXtRecseq:     s.XtRecseq,
	})
}

func (t *Tracer) setVars(vars map[string]any) error {
	for name, value := range vars {
		if err := t.vars[name].Set(value); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	return nil
}

// findSymbols asks the kernel (bpf_kallsyms_lookup_name, 5.16), or has it read what stands
// at those that readSymbols found.
func (t *Tracer) findSymbols() (s bpf.NftraceSymbols, err error) {
	sub := &ebpf.CollectionSpec{
		Maps: t.spec.Maps, Variables: t.spec.Variables,
		Types: t.spec.Types, ByteOrder: t.spec.ByteOrder,
		Programs: map[string]*ebpf.ProgramSpec{
			bpf.NftraceProgFindSymbols: t.spec.Programs[bpf.NftraceProgFindSymbols],
		},
	}
	coll, err := ebpf.NewCollectionWithOptions(sub, ebpf.CollectionOptions{MapReplacements: t.maps})
	if err != nil {
		return s, err
	}
	defer coll.Close()
	if _, err := coll.Programs[bpf.NftraceProgFindSymbols].Run(nil); err != nil {
		return s, err
	}
	err = t.vars[bpf.NftraceVarFoundSymbols].Get(&s)
	return s, err
}

// readSymbols looks up the symbols that kprobes need.
func (t *Tracer) readSymbols(path string) error {
	const hook, running, active = "nf_hook_slow", "current_kprobe", "bpf_prog_active"
	var s bpf.NftraceSymbols
	want := map[string]*uint64{
		"__per_cpu_offset": &s.PerCpuOffset,
		"__preempt_count":  &s.PreemptCount,
		"pcpu_hot":         &s.PcpuHot,
		"xt_recseq":        &s.XtRecseq,
		"xt_pernet_id":     &s.XtPernetId,
		"nf_tables_net_id": &s.NftNetId,
		"ebt_pernet_id":    &s.EbtPernetId,
	}
	found, err := readKallsyms(path, append(slices.Collect(maps.Keys(want)), hook, running, active)...)
	if err != nil {
		return err
	}
	for name, addr := range want {
		*addr = found[name].addr
	}
	return t.setVars(map[string]any{
		bpf.NftraceVarFoundSymbols:     s,
		bpf.NftraceVarSymHookSlow:      found[hook].addr,
		bpf.NftraceVarHookSlowSize:     found[hook].size,
		bpf.NftraceVarSymCurrentKprobe: found[running].addr,
		bpf.NftraceVarSymProgActive:    found[active].addr,
	})
}

const xtModule = "x_tables"

// setLayout tells the probes in the kernel itself what they cannot find out of module
// x_tables, and lets them look for tables.
func (t *Tracer) setLayout(types *btf.Cache) error {
	spec, err := xtTypes(types)
	if err != nil {
		return err
	}
	var table, info *btf.Struct
	if err := errors.Join(spec.TypeByName("xt_table", &table), spec.TypeByName("xt_table_info", &info)); err != nil {
		return fmt.Errorf("type information of module %s: %w", xtModule, err)
	}
	var head bpf.NftraceXtTableHead
	for name, want := range map[string]uintptr{
		"list": unsafe.Offsetof(head.Next), "valid_hooks": unsafe.Offsetof(head.ValidHooks), "private": unsafe.Offsetof(head.Private),
	} {
		if got, err := offsetOf(table, name); err != nil || got != uint32(want) {
			return fmt.Errorf("struct xt_table of this kernel is unknown to nftrace (%s at %d, not %d: %v); please report it", name, got, want, err)
		}
	}
	var s bpf.NftraceSymbols
	if err := t.vars[bpf.NftraceVarFoundSymbols].Get(&s); err != nil {
		return err
	}
	if s.XtRecseq == 0 || s.XtPernetId == 0 && !tablesInNet(types) {
		return errors.New("the kernel does not tell where its tables are (no symbol xt_recseq or xt_pernet_id; CONFIG_KALLSYMS_ALL=y is needed)")
	}
	layout := bpf.NftraceXtLayout{On: 1, PernetId: s.PernetId}
	var err1, err2, err3 error
	layout.Name, err1 = offsetOf(table, "name")
	layout.Number, err2 = offsetOf(info, "number")
	layout.Entries, err3 = offsetOf(info, "entries")
	if err := errors.Join(err1, err2, err3); err != nil {
		return err
	}
	return t.vars[bpf.NftraceVarXt].Set(layout)
}

// tablesInNet tells whether struct net has the lists of tables: see bpf/compat.h.
func tablesInNet(types *btf.Cache) bool {
	kernel, err := types.Kernel()
	if err != nil {
		return false
	}
	var xt *btf.Struct
	if err := kernel.TypeByName("netns_xt", &xt); err != nil {
		return false
	}
	_, err = offsetOf(xt, "tables")
	return err == nil
}

// offsetOf is the offset of a struct's member in bytes.
func offsetOf(s *btf.Struct, member string) (uint32, error) {
	for _, m := range s.Members {
		if m.Name == member {
			return m.Offset.Bytes(), nil
		}
	}
	return 0, fmt.Errorf("struct %s has no member %s", s.Name, member)
}

// symbol is where something is in the kernel; size is how far the next is.
type symbol struct{ addr, size uint64 }

// readKallsyms reads the addresses of symbols from a file like /proc/kallsyms.
func readKallsyms(path string, names ...string) (map[string]symbol, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read the kernel's symbols: %w", err)
	}
	defer f.Close()
	found, err := parseKallsyms(f, names...)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return found, nil
}

// parseKallsyms returns those of the named symbols that r, in the format of /proc/kallsyms,
// holds. The lines of the kernel's own functions are in the order of their addresses.
func parseKallsyms(r io.Reader, names ...string) (map[string]symbol, error) {
	want := map[string]bool{}
	for _, n := range names {
		want[n] = true
	}
	found := map[string]symbol{}
	var last string // of those found, while its size is not known
	s := bufio.NewScanner(r)
	for s.Scan() {
		// "ffffffff82e1c1c0 R __per_cpu_offset" or with "\t[module]" behind
		line := s.Bytes()
		const name = 19
		if len(line) <= name {
			continue
		}
		sym := line[name:]
		for i, c := range sym {
			if c == '\t' || c == ' ' {
				sym = sym[:i]
				break
			}
		}
		if last == "" && !want[string(sym)] {
			continue
		}
		addr, err := strconv.ParseUint(string(line[:16]), 16, 64)
		if err != nil {
			return nil, fmt.Errorf("line %q: %w", line, err)
		}
		if f := found[last]; last != "" && addr != f.addr {
			if addr > f.addr {
				f.size = addr - f.addr
				found[last] = f
			}
			last = ""
		}
		if _, ok := found[string(sym)]; !ok && want[string(sym)] {
			found[string(sym)] = symbol{addr: addr}
			last = string(sym)
		}
	}
	return found, s.Err()
}
