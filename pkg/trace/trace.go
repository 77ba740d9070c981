package trace

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"github.com/nftrace/nftrace/bpf"
	"github.com/nftrace/nftrace/pkg/events"
	"github.com/nftrace/nftrace/pkg/filter"
)

// filterFunc is the function of the probes that filter expressions replace.
const filterFunc = "filter_expr"

// Iface is an interface of a network namespace (by the namespace's inode number).
type Iface struct {
	Netns uint32
	Index uint32
}

// Backend is how the kernel is probed.
type Backend string

const (
	Fentry Backend = "fentry" // fentry and fexit, with what else BPF has had since about Linux 5.17
	Kprobe Backend = "kprobe" // kprobes and kretprobes, and nothing that Linux 5.10 lacks
)

// Options says what to trace. The zero value traces every packet.
type Options struct {
	// Backend is how to probe the kernel; "" is Fentry where the kernel can do that, but for
	// modules whose functions it cannot probe so.
	Backend Backend
	// Filter is the compiled filter expression: a function that takes a
	// pointer to struct pkt_tuple in R1 and returns 0 or 1. nil: everything.
	Filter asm.Instructions
	// Netns, Ifaces and Addrs limit tracing to packets that are seen in one of these
	// namespaces, at one of these interfaces, or with one of these addresses as
	// source or destination. All empty: everywhere.
	Netns  []uint32
	Ifaces []Iface
	Addrs  []netip.Addr
	// MaxRules is the number of rules, policies included, for which room is made in
	// all tables of a namespace and family together; 0 means 1,024.
	MaxRules int
	// BufferBytes is the size of the ring buffer, a power of two and a multiple
	// of the page size; 0 means 8 MiB.
	BufferBytes int
}

// group is a set of probes whose functions are in one module (or in vmlinux), which
// are loaded and attached together.
type group struct {
	module   string // "" for vmlinux
	programs []string
	// present, if set, tells whether the kernel has the functions, or needs the probes.
	present func() bool
	// choose, if set, returns one more: the one that fits the kernel's function.
	choose func(*Tracer, *btf.Cache) (string, error)
	// optional is whether the group is left out where the module lacks one of the functions,
	// since it was built without, or the compiler made it a part of who calls it; untraced is
	// what is not traced then, if anything.
	optional bool
	untraced string
	// ifaces is whether it is left out where no interfaces are asked for.
	ifaces bool
	// typed is whether the probes read structs that the module's type information alone knows.
	typed bool
}

var groups = []group{
	{module: xtModule, programs: []string{bpf.NftraceProgTableFree, bpf.NftraceProgTableLookup, bpf.NftraceProgTableReplaced}},
	{module: "bridge", programs: []string{bpf.NftraceProgBrForward}},
	{module: "bridge", programs: []string{bpf.NftraceProgPortIn}, ifaces: true},
	{module: "nf_defrag_ipv6", programs: []string{bpf.NftraceProgDefragIp6}},
	{module: "nf_nat", programs: []string{bpf.NftraceProgNat, bpf.NftraceProgNatIcmp, bpf.NftraceProgNatIcmp6}},
	{module: nftModule, programs: []string{bpf.NftraceProgNftCommit, bpf.NftraceProgNftCommitted, bpf.NftraceProgNftState, bpf.NftraceKprobeProgNftLook}, choose: nftProgram, typed: true, untraced: "nf_tables is not traced"},
	// Without CONFIG_NF_TABLES_BRIDGE there are no chains for it.
	{module: nftModule, programs: []string{bpf.NftraceProgNftBridge}, optional: true, typed: true},
	{module: "nf_flow_table", programs: []string{bpf.NftraceProgFlowIp, bpf.NftraceProgFlowIpDone, bpf.NftraceProgFlowIp6, bpf.NftraceProgFlowIp6Done}},
	{module: "nfnetlink_queue", programs: []string{bpf.NftraceProgQueue, bpf.NftraceProgQueueRefused, bpf.NftraceProgReinject}, optional: true, untraced: "what NFQUEUE's programs send back is not traced"},
	{module: ebtModule, programs: []string{
		bpf.NftraceProgEbtEnd,
		bpf.NftraceProgEbtReplace, bpf.NftraceProgEbtReplaced, bpf.NftraceProgEbtUnregister, bpf.NftraceProgEbtLookup,
		bpf.NftraceProgEbtSet, bpf.NftraceProgEbtSetOver, bpf.NftraceProgEbtList,
	}, choose: ebtProgram, optional: true, typed: true, untraced: "legacy tables of ebtables are not traced"},
	{programs: []string{bpf.NftraceProgDeliverIp6}, present: hasIPv6},
	// A kernel that has it in its own file may have made it a part of who calls it.
	{programs: []string{bpf.NftraceProgSkbMerged}, optional: true},
	{programs: []string{
		bpf.NftraceProgSkbRelease, bpf.NftraceProgSkbMorph, bpf.NftraceProgSkbDrop, bpf.NftraceProgDefragIp,
		bpf.NftraceProgDevXmit, bpf.NftraceProgDeliverIp,
		bpf.NftraceProgSoftirqExit, bpf.NftraceProgSchedSwitch,
		bpf.NftraceProgHookEnter,
		bpf.NftraceKprobeProgReceive,
	}},
	{programs: []string{bpf.NftraceProgHookEnter1, bpf.NftraceProgHookEnter2}, present: func() bool { return hookCopies() > 1 }},
	{programs: []string{bpf.NftraceProgHookEnter3, bpf.NftraceProgHookEnter4, bpf.NftraceProgHookEnter5}, present: func() bool { return hookCopies() > 2 }},
}

// hookCopies is how many copies of hook_enter are attached, which jump to it; 1: itself. A
// softirq must not hit one that runs where there is one CPU for all, whose counters take long
// to copy; where tasks preempt each other, one of them may keep one for long.
func hookCopies() int {
	cpus, err := ebpf.PossibleCPU()
	switch {
	case tasksPreempt():
		return 5
	case err == nil && cpus == 1:
		return 2
	default:
		return 1
	}
}

// waitFor are the modules of which nftrace tells people that it waits for them.
var waitFor = []string{"ip_tables", "ip6_tables", "arp_tables", nftModule, ebtModule}

// Tracer is a set of attached probes. Its methods are to be called from one goroutine, but
// for Close, Stop, ReadTable, and Lookup, which is for one at a time.
type Tracer struct {
	backend  Backend    // of the kernel's own functions
	auto     bool       // modules may have the other one
	missing  string     // what the kernel lacks of what the other one needs, if that was the choice
	kprobes  []string   // where modules do have it, and why
	untraced []untraced // see Untraced
	byHand   bool       // see unknown
	logsAE   bool
	hashes   bool // see HashesFlows
	modules  *modules

	options Options
	spec    *ebpf.CollectionSpec
	maps    map[string]*ebpf.Map
	vars    map[string]*ebpf.Variable
	ring    *ring
	news    *ring   // see ReadTable
	key     *nftKey // nil: nf_tables is not there

	// The other backend's, once a module needs kprobes where the kernel itself does not.
	kprobeSpec *ebpf.CollectionSpec
	kprobeMaps map[string]*ebpf.Map

	nftState *ebpf.Program // see NFTIdle
	ebtList  *ebpf.Program // see EBTNames

	mu      sync.Mutex
	colls   []*ebpf.Collection
	links   map[string]link.Link // by program
	pending []group              // of modules that are not there
	waiting []string             // see Waiting
}

// untraced is something of a module that is not traced, and why.
type untraced struct{ module, what string }

// Open loads the probes into the kernel and attaches them. Probes in modules that
// are not loaded wait: see Waiting and AttachModules.
func Open(o Options) (*Tracer, error) {
	if err := CheckKernel(); err != nil {
		return nil, err
	}
	// Before Linux 5.11 maps and programs count against it, those of others of this user, too;
	// and what the library once finds missing is missing for good.
	if err := rlimit.RemoveMemlock(); err != nil {
		return nil, loadError("lift the limit of locked memory", err)
	}
	asked := o.Backend
	if asked == "" {
		o.Backend = Fentry
	}
	t, err := open(o, asked == "")
	if err == nil || asked == Kprobe {
		return t, err
	}
	// What the kernel lacks is asked only then, for asking takes time.
	missing := lacking()
	switch {
	case missing == "":
		return nil, err
	case asked == Fentry:
		return nil, fmt.Errorf("kernel %s lacks what fentry probes need: %s", kernelRelease(), missing)
	}
	o.Backend = Kprobe
	if t, err = open(o, false); err == nil {
		t.missing = missing
	}
	return t, err
}

func open(o Options, auto bool) (*Tracer, error) {
	spec, err := loadSpec(o)
	if err != nil {
		return nil, err
	}
	t := &Tracer{backend: o.Backend, auto: auto, options: o, spec: spec, links: map[string]link.Link{}}
	t.byHand = o.Backend == Kprobe && errors.Is(haveModuleBTF(), ebpf.ErrNotSupported) && tablesInNet(btf.NewCache())
	if err := t.start(o); err != nil {
		t.Close()
		return nil, err
	}
	return t, nil
}

// loadSpec is the object of a backend's probes, configured.
func loadSpec(o Options) (*ebpf.CollectionSpec, error) {
	load := bpf.LoadNftrace
	if o.Backend == Kprobe {
		load = bpf.LoadNftraceKprobe
	}
	spec, err := load()
	if err != nil {
		return nil, fmt.Errorf("parse the probes: %w", err)
	}
	return spec, configure(spec, o)
}

// configure sets the constants and the sizes of the maps.
func configure(spec *ebpf.CollectionSpec, o Options) error {
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return fmt.Errorf("count the CPUs: %w", err)
	}
	maxRules := o.MaxRules
	if maxRules == 0 {
		maxRules = 1024
	}
	const block = uint32(len(bpf.NftraceBlock{}.C))
	const tables = uint32(len(bpf.NftraceFrame{}.Tables))
	blocks := (uint32(maxRules)+block-1)/block + tables

	frames := uint32(cpus) * uint32(bpf.NftraceLimitsFRAMES)
	spec.Maps[bpf.NftraceMapFrames].MaxEntries = frames
	spec.Maps[bpf.NftraceMapXtSnap].MaxEntries = frames*blocks + uint32(cpus)*uint32(bpf.NftraceLimitsKEPT)
	spec.Maps[bpf.NftraceMapCpus].MaxEntries = uint32(cpus)
	spec.Maps[bpf.NftraceMapHookTaken].MaxEntries = uint32(cpus)
	if o.BufferBytes != 0 {
		spec.Maps[bpf.NftraceMapRecords].MaxEntries = uint32(o.BufferBytes)
	}

	kprobe := o.Backend == Kprobe
	if kprobe {
		// These programs must not allocate.
		spec.Maps[bpf.NftraceMapXtTables].Flags &^= unix.BPF_F_NO_PREALLOC
		spec.Maps[bpf.NftraceMapXtTables].MaxEntries = 2048
	}
	// A kprobe runs with preemption off, and a softirq that interrupts one hits no other.
	copies := uint32(1)
	if !kprobe {
		copies = uint32(hookCopies())
	}
	for name, value := range map[string]any{
		bpf.NftraceVarHookCopies:   copies,
		bpf.NftraceVarTasksPreempt: tasksPreempt() && !kprobe,
		bpf.NftraceVarWakeBytes:    uint64(spec.Maps[bpf.NftraceMapRecords].MaxEntries) / 4,
		bpf.NftraceVarNrCpus:       uint32(cpus),
		bpf.NftraceVarSnapBlocks:   blocks,
		bpf.NftraceVarUseFilter:    len(o.Netns)+len(o.Ifaces)+len(o.Addrs)+len(o.Filter) > 0,
		bpf.NftraceVarUsePlaces:    len(o.Netns)+len(o.Ifaces)+len(o.Addrs) > 0,
		bpf.NftraceVarUseNetns:     len(o.Netns) > 0,
		bpf.NftraceVarUseIfaces:    len(o.Ifaces) > 0,
		bpf.NftraceVarIfaceBits:    ifaceBits(o.Ifaces),
		bpf.NftraceVarUseAddrs:     len(o.Addrs) > 0,
		bpf.NftraceVarUseExpr:      len(o.Filter) > 0,
		bpf.NftraceVarUseLater:     mayMatchLater(o.Filter),
		bpf.NftraceVarUseDetail:    looksAtDetail(o.Filter),
		bpf.NftraceVarUseMac:       looksAtMAC(o.Filter),
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	for _, p := range spec.Programs {
		nameFunctions(p.Instructions)
	}
	if tasksPreempt() && !kprobe {
		for _, name := range []string{bpf.NftraceProgHookEnter, bpf.NftraceProgNftTrace, bpf.NftraceProgReinject} {
			makeStatic(spec.Programs[name].Instructions)
		}
	}
	if len(o.Filter) == 0 {
		return nil
	}
	for _, p := range spec.Programs {
		if !hasSymbol(p.Instructions, filterFunc) {
			continue
		}
		if p.Instructions, err = filter.Replace(p.Instructions, filterFunc, o.Filter); err != nil {
			return err
		}
	}
	return nil
}

// nameFunctions gives each function a line of source, its name: what CO-RE poisons gets one, and
// the kernel wants one at the beginning of each function if there are any.
func nameFunctions(insns asm.Instructions) {
	for i := range insns {
		if f := btf.FuncMetadata(&insns[i]); f != nil {
			insns[i] = insns[i].WithSource(asm.Comment(f.Name))
		}
	}
}

// makeStatic makes a program's functions static: no others can be called with preemption off.
func makeStatic(insns asm.Instructions) {
	for i := range insns {
		if f := btf.FuncMetadata(&insns[i]); f != nil && i > 0 {
			static := *f
			static.Linkage = btf.StaticFunc
			insns[i] = btf.WithFuncMetadata(insns[i], &static)
		}
	}
}

// ifaceBits has a bit for each interface: index modulo 64.
func ifaceBits(ifaces []Iface) (bits uint64) {
	for _, i := range ifaces {
		bits |= 1 << (i.Index % 64)
	}
	return bits
}

func hasSymbol(insns asm.Instructions, name string) bool {
	return slices.ContainsFunc(insns, func(i asm.Instruction) bool { return i.Symbol() == name })
}

// mayMatchLater tells whether a filter looks at what may change on a packet's way: addresses and
// ports, by NAT; length, by defragmentation; Ethernet addresses and VLAN, from device to device.
func mayMatchLater(insns asm.Instructions) bool {
	var t filter.Tuple
	return looksAtMAC(insns) ||
		loads(insns, unsafe.Offsetof(t.Len), unsafe.Sizeof(t.Len)) ||
		loads(insns, unsafe.Offsetof(t.VLAN), unsafe.Sizeof(t.VLAN)) ||
		loads(insns, unsafe.Offsetof(t.SAddr), unsafe.Sizeof(t.SAddr)) ||
		loads(insns, unsafe.Offsetof(t.DAddr), unsafe.Sizeof(t.DAddr)) ||
		loads(insns, unsafe.Offsetof(t.SPort), unsafe.Sizeof(t.SPort)) ||
		loads(insns, unsafe.Offsetof(t.DPort), unsafe.Sizeof(t.DPort))
}

// looksAtDetail tells whether a filter looks at what differs between packets of one flow.
func looksAtDetail(insns asm.Instructions) bool {
	var t filter.Tuple
	return loads(insns, unsafe.Offsetof(t.Len), unsafe.Sizeof(t.Len)) ||
		looksAtMAC(insns) ||
		loads(insns, unsafe.Offsetof(t.TCPFlags), unsafe.Sizeof(t.TCPFlags)) ||
		loads(insns, unsafe.Offsetof(t.ICMPType), unsafe.Sizeof(t.ICMPType)) ||
		loads(insns, unsafe.Offsetof(t.ICMPCode), unsafe.Sizeof(t.ICMPCode))
}

// looksAtMAC tells whether a filter looks at Ethernet addresses, which cost a read.
func looksAtMAC(insns asm.Instructions) bool {
	var t filter.Tuple
	return loads(insns, unsafe.Offsetof(t.SMAC), unsafe.Sizeof(t.SMAC)) ||
		loads(insns, unsafe.Offsetof(t.DMAC), unsafe.Sizeof(t.DMAC))
}

// loads tells whether a filter loads anything from some bytes of the tuple.
func loads(insns asm.Instructions, off, size uintptr) bool {
	return slices.ContainsFunc(insns, func(ins asm.Instruction) bool {
		at := uintptr(ins.Offset)
		return ins.OpCode.Class() == asm.LdXClass && ins.Src == asm.R1 && at >= off && at < off+size
	})
}

// start loads and attaches. What it made is closed by Close if it fails.
func (t *Tracer) start(o Options) error {
	spec := &ebpf.CollectionSpec{
		Maps: t.spec.Maps, Variables: t.spec.Variables,
		Types: t.spec.Types, ByteOrder: t.spec.ByteOrder,
	}
	coll, err := ebpf.NewCollection(spec)
	if err != nil {
		return loadError("create the maps", err)
	}
	t.colls = append(t.colls, coll)
	t.maps, t.vars = coll.Maps, coll.Variables
	one := uint8(1)
	for _, ns := range o.Netns {
		if err := t.maps[bpf.NftraceMapFilterNetns].Put(ns, one); err != nil {
			return fmt.Errorf("more namespaces than the filter has room for: %w", err)
		}
	}
	for _, i := range o.Ifaces {
		key := bpf.NftraceIface{Netns: i.Netns, Ifindex: i.Index}
		if err := t.maps[bpf.NftraceMapFilterIfaces].Put(key, one); err != nil {
			return fmt.Errorf("more interfaces than the filter has room for: %w", err)
		}
	}
	for _, a := range o.Addrs {
		var key bpf.NftraceAddr
		copy(key.B[:], a.AsSlice())
		if err := t.maps[bpf.NftraceMapFilterAddrs].Put(key, one); err != nil {
			return fmt.Errorf("more addresses than the filter has room for: %w", err)
		}
	}
	if t.ring, err = newRing(t.maps[bpf.NftraceMapRecords]); err != nil {
		return fmt.Errorf("read the ring buffer: %w", err)
	}
	if t.news, err = newRing(t.maps[bpf.NftraceMapNewTables]); err != nil {
		return fmt.Errorf("read the news of tables: %w", err)
	}
	types := btf.NewCache()
	kernel, err := types.Kernel()
	if err != nil {
		return fmt.Errorf("read the type information of the kernel: %w", err)
	}
	t.logsAE = knowsAE(kernel)
	dropLackedKfuncs(t.spec.Programs, kernel)
	t.modules = findModules(modulesPath, kernel)
	t.waiting = slices.DeleteFunc(slices.Clone(waitFor), t.modules.has)
	var ready []group
	for _, g := range groups {
		if t.spec.Programs[g.programs[0]] == nil || g.present != nil && !g.present() || g.ifaces && len(o.Ifaces) == 0 {
			continue
		}
		// What a flowtable's name is, handmadeTypes do not say.
		if g.module == "nf_flow_table" && t.byHand {
			continue
		}
		if !t.modules.has(g.module) {
			t.pending = append(t.pending, g)
			continue
		}
		ready = append(ready, g)
	}
	// Behind the look at what modules there are: one that came in between waits.
	if err := t.setSymbols(); err != nil {
		return err
	}
	if err := t.attach(ready, types); err != nil {
		return err
	}
	// Whatever becomes of a packet, a probe is there to see it.
	return t.vars[bpf.NftraceVarTracing].Set(uint64(1))
}

// attach loads and attaches the probes of some groups, in their order. Those of a backend are
// loaded together, because reading the kernel's type information takes most of the time. types are
// for one call: they would not know the modules that are loaded later.
func (t *Tracer) attach(gs []group, types *btf.Cache) error {
	gs, kprobes, err := t.split(gs)
	if err != nil {
		return err
	}
	gs = slices.DeleteFunc(gs, func(g group) bool { return g.optional && !t.hasFunctions(g, types) })
	coll, err := t.attachBy(t.backend, gs, types)
	if err != nil && t.auto {
		// Which functions it was is asked only then, for asking takes time.
		var more []group
		if gs, more = t.splitRefused(gs, types); len(more) > 0 {
			kprobes = append(kprobes, more...)
			coll, err = t.attachBy(t.backend, gs, types)
		}
	}
	if err == nil {
		err = t.tell(gs, types, coll)
	}
	if err != nil || len(kprobes) == 0 {
		return err
	}
	if err := t.mix(); err != nil {
		return err
	}
	if coll, err = t.attachBy(Kprobe, kprobes, types); err != nil {
		return err
	}
	return t.tell(kprobes, types, coll)
}

// attachBy loads and attaches the probes of some groups by one backend. If it fails, none of them
// are there. The program that a group chose is its last one then.
func (t *Tracer) attachBy(b Backend, gs []group, types *btf.Cache) (*ebpf.Collection, error) {
	spec, replacements := t.spec, t.maps
	if b != t.backend {
		spec, replacements = t.kprobeSpec, t.kprobeMaps
	}
	sub := &ebpf.CollectionSpec{
		Maps: spec.Maps, Variables: spec.Variables,
		Types: spec.Types, ByteOrder: spec.ByteOrder,
		Programs: map[string]*ebpf.ProgramSpec{},
	}
	for i := range gs {
		g := &gs[i]
		if g.choose != nil {
			name, err := g.choose(t, types)
			if err != nil {
				return nil, err
			}
			g.programs, g.choose = append(slices.Clone(g.programs), name), nil
		}
		for _, name := range g.programs {
			// Of two backends, each has its own.
			for _, part := range []string{name, name + "_call"} {
				if p := spec.Programs[part]; p != nil {
					sub.Programs[part] = p
				}
			}
			for i := range copiesOf(b, name, types) {
				sub.Programs[copyName(name, i+1)] = spec.Programs[name].Copy()
			}
		}
	}
	extra, err := t.handmade(gs, types)
	if err != nil {
		return nil, err
	}
	coll, err := ebpf.NewCollectionWithOptions(sub, ebpf.CollectionOptions{
		MapReplacements: replacements, Cache: types,
		Programs: ebpf.ProgramOptions{ExtraRelocationTargets: extra},
	})
	if err != nil {
		return nil, loadError("load the probes", err)
	}
	if hook := coll.Programs[bpf.NftraceProgHookEnter]; hook != nil && hookCopies() > 1 && b != Kprobe {
		if err := t.maps[bpf.NftraceMapHookProgram].Put(uint32(0), hook); err != nil {
			coll.Close()
			return nil, fmt.Errorf("let probes jump to %s: %w", bpf.NftraceProgHookEnter, err)
		}
		delete(sub.Programs, bpf.NftraceProgHookEnter)
	}
	maps.DeleteFunc(sub.Programs, func(_ string, p *ebpf.ProgramSpec) bool { return p.AttachTo == "" }) // which are run by us
	links, err := attachAll(coll, sub.Programs)
	if err != nil {
		closeLinks(links)
		coll.Close()
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	maps.Copy(t.links, links)
	t.colls = append(t.colls, coll)
	return coll, nil
}

// tell lets the probes of some groups tell, once they are attached.
func (t *Tracer) tell(gs []group, types *btf.Cache, coll *ebpf.Collection) error {
	for _, g := range gs {
		var err error
		switch g.module {
		case xtModule:
			err = t.setLayout(types)
		case ebtModule:
			err = t.startEBT(types, coll.Programs)
		case nftModule:
			if g.optional {
				continue
			}
			err = t.startNFT(types, coll.Programs, g.programs[len(g.programs)-1])
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// hasFunctions tells whether a group's module has all functions that its probes are attached
// to, and notes what is not traced if not.
func (t *Tracer) hasFunctions(g group, types *btf.Cache) bool {
	spec, err := t.modules.types(g.module, types)
	if err != nil {
		return true // who loads the probes says what is wrong
	}
	var attachTo []string
	for _, name := range g.programs {
		if p := t.spec.Programs[name]; p != nil && p.AttachTo != "" {
			attachTo = append(attachTo, p.AttachTo)
		}
	}
	lacks := lackedFunction(spec, attachTo)
	if lacks != "" && g.untraced != "" {
		t.untraced = append(t.untraced, untraced{g.module, fmt.Sprintf("%s on this kernel: it has no function %s", g.untraced, lacks)})
	}
	return lacks == ""
}

// lackedFunction names the first of some functions that the type information of a module, or of
// the kernel itself, does not know; "" if it knows all.
func lackedFunction(spec *btf.Spec, functions []string) string {
	for _, name := range functions {
		var f *btf.Func
		if errors.Is(spec.TypeByName(name, &f), btf.ErrNotFound) {
			return name
		}
	}
	return ""
}

// copies is how many more of a program are attached where tasks preempt each other; the
// first one that the kernel does not skip does the work.
var copies = map[string]int{bpf.NftraceProgNftTrace: len(bpf.NftraceFrame{}.Skipped) - 1}

// copiesOf is how many of them this kernel gets.
func copiesOf(b Backend, program string, types *btf.Cache) int {
	if b == Kprobe || !tasksPreempt() || program == bpf.NftraceProgNftTrace && !canKeepTask(types) {
		return 0
	}
	return copies[program]
}

func copyName(program string, i int) string { return fmt.Sprintf("%s_%d", program, i) }

// canKeepTask tells whether a program can turn preemption off (see bpf/compat.h).
func canKeepTask(types *btf.Cache) bool {
	kernel, err := types.Kernel()
	if err != nil {
		return false
	}
	var f *btf.Func
	return kernel.TypeByName("bpf_preempt_disable", &f) == nil
}

// attachAll attaches the programs of a collection; if one fails, the others' links are returned
// with the error. The kernel waits a while in each; it waits for all at once, but for those of
// one function: of these it runs the one first that was attached last, and the first of
// copies is to run first.
func attachAll(coll *ebpf.Collection, specs map[string]*ebpf.ProgramSpec) (map[string]link.Link, error) {
	at := map[string][]string{}
	for name, spec := range specs {
		at[spec.AttachTo] = append(at[spec.AttachTo], name)
	}
	type attached struct {
		name string
		link link.Link
		err  error
	}
	done := make(chan attached, len(specs))
	for _, names := range at {
		slices.Sort(names)
		go func() {
			for _, name := range slices.Backward(names) {
				l, err := attachProgram(specs[name], coll.Programs[name])
				if err != nil {
					err = loadError("attach to "+specs[name].AttachTo, err)
				}
				done <- attached{name, l, err}
			}
		}()
	}
	links := map[string]link.Link{}
	var first error
	for range specs {
		switch a := <-done; {
		case a.err == nil:
			links[a.name] = a.link
		case first == nil:
			first = a.err
		}
	}
	return links, first
}

// closeLinks detaches. The kernel waits a while in each; it waits for all at once.
func closeLinks(links map[string]link.Link) error {
	errs := make(chan error, len(links))
	for _, l := range links {
		go func() { errs <- l.Close() }()
	}
	var err error
	for range links {
		err = errors.Join(err, <-errs)
	}
	return err
}

func attachProgram(spec *ebpf.ProgramSpec, p *ebpf.Program) (link.Link, error) {
	switch {
	case spec.Type == ebpf.RawTracepoint:
		return link.AttachRawTracepoint(link.RawTracepointOptions{Name: spec.AttachTo, Program: p})
	case strings.HasPrefix(spec.SectionName, "kretprobe/"):
		return link.Kretprobe(spec.AttachTo, p, nil)
	case spec.Type == ebpf.Kprobe:
		return link.Kprobe(spec.AttachTo, p, nil)
	}
	return link.AttachTracing(link.TracingOptions{Program: p})
}

// Untraced says what this kernel's probes cannot tell, and why; "" if there is nothing. It may
// be more once AttachModules has been called.
func (t *Tracer) Untraced() string {
	var all []string
	for _, u := range t.untraced {
		all = append(all, u.what)
	}
	return strings.Join(all, "; ")
}

// BuiltIn tells whether a module is built into the kernel, of those that nftrace probes or reads.
func (t *Tracer) BuiltIn(module string) bool { return t.modules.builtIn[module] }

// Waiting returns the modules of rulesets that are not loaded; they are traced from when
// they are: see AttachModules.
func (t *Tracer) Waiting() []string { return t.waiting }

// AttachModules attaches the probes of the modules that have been loaded since the
// last call. It returns the names of those of Waiting that are traced since.
func (t *Tracer) AttachModules() ([]string, error) {
	return t.attachLoaded(func(gs []group) error {
		if err := t.setSymbols(); err != nil {
			return err
		}
		return t.attach(gs, btf.NewCache())
	})
}

func (t *Tracer) attachLoaded(attach func([]group) error) ([]string, error) {
	var ready, rest []group
	for _, g := range t.pending {
		if t.modules.has(g.module) {
			ready = append(ready, g)
		} else {
			rest = append(rest, g)
		}
	}
	var loaded, waiting []string
	for _, m := range t.waiting {
		if t.modules.has(m) {
			loaded = append(loaded, m)
		} else {
			waiting = append(waiting, m)
		}
	}
	t.pending, t.waiting = rest, waiting
	if len(ready) == 0 {
		return loaded, nil
	}
	if err := attach(ready); err != nil {
		return nil, err
	}
	return slices.DeleteFunc(loaded, func(m string) bool {
		return slices.ContainsFunc(t.untraced, func(u untraced) bool { return u.module == m })
	}), nil
}

// Read returns the next record. It waits until deadline at the most and then
// returns os.ErrDeadlineExceeded; the kernel does not wake the reader for each record.
// The bytes are valid until the next call.
func (t *Tracer) Read(deadline time.Time) ([]byte, error) {
	return t.ring.read(deadline)
}

// Written is how many bytes of records there were so far, and Taken how many of them Read has
// returned: when that is Written of some time, Read has returned all that there was by then. They are
// for the goroutine that reads.
func (t *Tracer) Written() uint64 { return t.ring.written() }

// Taken is explained at Written.
func (t *Tracer) Taken() uint64 { return t.ring.taken() }

// NewTable is a table that replaced another, or a new generation of a namespace's nf_tables.
type NewTable struct {
	NFT   uint32         // nf_tables: the generation (NFTA_GEN_ID)
	ID    events.TableID // xtables; of ebtables' only Private is known
	Netns uint32         // inode of the network namespace; xtables: that of the program that did it
	PF    uint8          // xtables and ebtables: events.PFIPv4 …
	Name  string         // xtables and ebtables
}

// ReadTable returns the next table that replaced another, as Read does a record. It may be
// called while another goroutine reads records.
func (t *Tracer) ReadTable(deadline time.Time) (NewTable, error) {
	for {
		raw, err := t.news.read(deadline)
		if err != nil {
			return NewTable{}, err
		}
		if uintptr(len(raw)) < unsafe.Sizeof(bpf.NftraceNewTable{}) {
			continue // no probe of ours wrote it
		}
		n := (*bpf.NftraceNewTable)(unsafe.Pointer(unsafe.SliceData(raw)))
		if n.Private == 0 {
			return NewTable{NFT: uint32(n.Gen), Netns: n.Netns}, nil
		}
		return NewTable{
			ID:    events.TableID{Private: n.Private, Gen: n.Gen},
			Netns: n.Netns, PF: uint8(n.Pf), Name: cString(n.Name[:]),
		}, nil
	}
}

func cString(s []int8) string {
	b := make([]byte, 0, len(s))
	for _, c := range s {
		if c == 0 {
			break
		}
		b = append(b, byte(c))
	}
	return string(b)
}

// Lookup runs read, which asks the kernel for one table's entries (from this
// process, with IPT_SO_GET_ENTRIES or what other families have for it), and tells which
// generation of the table the kernel handed out. It must not be called while it runs.
//
// The kernel may skip the probe that sees it: a return probe of Linux 5.10 has room for one call per
// CPU, and others may be waiting for their tables. Then read runs again.
func (t *Tracer) Lookup(read func() error) (events.TableID, error) {
	v := t.vars[bpf.NftraceVarLastLookup]
	return lookup(read, func() error { return v.Set(bpf.NftraceLookup{}) }, func() (l bpf.NftraceLookup, err error) {
		err = v.Get(&l)
		return l, err
	})
}

// lookupTries bounds how often a table is read whose generation the probe did not see, waiting
// twice as long each time: 127 ms in all.
const lookupTries = 8

func lookup(read, clear func() error, seen func() (bpf.NftraceLookup, error)) (events.TableID, error) {
	wait := time.Millisecond
	for try := 1; ; try++ {
		if err := clear(); err != nil {
			return events.TableID{}, err
		}
		if err := read(); err != nil {
			return events.TableID{}, err
		}
		l, err := seen()
		if err != nil {
			return events.TableID{}, err
		}
		if l.Private != 0 || try == lookupTries {
			return events.TableID{Private: l.Private, Gen: l.Gen}, nil
		}
		time.Sleep(wait)
		wait *= 2
	}
}

// Losses are counts of what was not recorded, by cause.
type Losses struct {
	RingBuffer uint64 // records: the buffer was full
	Journeys   uint64 // packets: too many under way at once
	Frames     uint64 // calls of hooks: too many open at once on a CPU
	// Probes counts hits of probes that the kernel skipped (recursion); of those that are there
	// more than once, it is no less. Of kprobes: packets that were met while they were skipped,
	// and returns of functions.
	Probes uint64
}

// Total is the sum over all causes but Probes: those may have been hits of packets that
// nobody follows.
func (l Losses) Total() uint64 { return l.RingBuffer + l.Journeys + l.Frames }

// Losses reads the counters.
func (t *Tracer) Losses() (Losses, error) {
	var l Losses
	for cause, field := range map[bpf.NftraceLoss]*uint64{
		bpf.NftraceLossLOSS_RINGBUF:  &l.RingBuffer,
		bpf.NftraceLossLOSS_JOURNEYS: &l.Journeys,
		bpf.NftraceLossLOSS_FRAMES:   &l.Frames,
		bpf.NftraceLossLOSS_SKIPPED:  &l.Probes,
	} {
		var perCPU []uint64
		if err := t.maps[bpf.NftraceMapLosses].Lookup(uint32(cause), &perCPU); err != nil {
			return l, fmt.Errorf("read the loss counters: %w", err)
		}
		for _, n := range perCPU {
			*field += n
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, c := range t.colls {
		misses := map[string]uint64{}
		for name, p := range c.Programs {
			if t.links[name] == nil {
				continue // others jump to it
			}
			stats, err := p.Stats()
			if err != nil {
				return l, fmt.Errorf("read the counts of skipped probes: %w", err)
			}
			misses[name] = stats.RecursionMisses
		}
		l.Probes += skippedCalls(misses)
	}
	return l, nil
}

// skippedCalls is how many calls of functions were skipped, by how often the kernel skipped each
// program that is attached. Of copies one is enough: at most as many calls were skipped by all of them
// as by the one that skipped least.
func skippedCalls(misses map[string]uint64) uint64 {
	least := map[string]uint64{}
	for name, n := range misses {
		of := strings.TrimRight(name, "0123456789")
		if !strings.HasSuffix(of, "_") {
			of = name + "_" // no copy, or the first
		}
		if had, ok := least[of]; !ok || n < had {
			least[of] = n
		}
	}
	var sum uint64
	for _, n := range least {
		sum += n
	}
	return sum
}

// Live is the number of packets that are followed at this moment.
func (t *Tracer) Live() (uint64, error) {
	var n uint64
	err := t.vars[bpf.NftraceVarLive].Get(&n)
	return n, err
}

// Stop begins no more journeys; those under way go on. It may be called while another
// goroutine reads. The probes stay: one that went first would leave holes in what the
// others still tell.
func (t *Tracer) Stop() error { return t.vars[bpf.NftraceVarTracing].Set(uint64(0)) }

// Close detaches everything. Nothing is left in the kernel.
func (t *Tracer) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	err := closeLinks(t.links)
	clear(t.links)
	if t.key != nil {
		err = errors.Join(err, t.key.Close())
	}
	for _, r := range []*ring{t.ring, t.news} {
		if r != nil {
			err = errors.Join(err, r.close())
		}
	}
	for _, c := range t.colls {
		c.Close()
	}
	t.colls = nil
	return err
}

// ran is the error of a program that was run, which says by its code that it failed.
func ran(code uint32, err error) error {
	if err == nil && code != 0 {
		err = fmt.Errorf("the probe could not read the kernel's memory (it returned %d)", int32(code))
	}
	return err
}

// loadError says what the kernel refused, with the cure where it is known.
func loadError(doing string, err error) error {
	var ve *ebpf.VerifierError
	switch {
	case errors.As(err, &ve):
		return &VerifierError{doing: doing, err: ve}
	case errors.Is(err, unix.E2BIG):
		return fmt.Errorf("%s: too many tracers are attached there (a function can have 38 probes); end other nftraces", doing)
	case errors.Is(err, os.ErrPermission):
		if mode := lockdownMode(lockdownPath); mode == "confidentiality" {
			return fmt.Errorf("%s: the kernel is locked down (confidentiality), which forbids tracing; boot without lockdown=confidentiality", doing)
		}
		return fmt.Errorf("%s: not permitted, although this is root: it lacks CAP_SYS_ADMIN, or seccomp forbids bpf, as in a container without --privileged: %w", doing, err)
	default:
		return fmt.Errorf("%s: %w", doing, err)
	}
}

// VerifierError is the kernel's refusal of a probe. Log holds all that it said.
type VerifierError struct {
	doing string
	err   *ebpf.VerifierError
}

func (e *VerifierError) Error() string {
	return fmt.Sprintf("%s: the kernel's verifier refused it: %v (kernel %s; please report it with the output of nftrace -v)",
		e.doing, e.err.Cause, kernelRelease())
}

func (e *VerifierError) Unwrap() error { return e.err }

// Log is the verifier's log.
func (e *VerifierError) Log() string { return strings.Join(e.err.Log, "\n") }
