package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nftrace/nftrace/pkg/events"
	"github.com/nftrace/nftrace/pkg/symbolize"
	"github.com/nftrace/nftrace/pkg/trace"
)

const (
	// tick is how often nftrace looks at anything but records. The kernel does not
	// wake it for each record, so it is also how late a packet may be printed.
	tick = 50 * time.Millisecond
	// quiet is how long nothing must come of packets that are wanted until what a command caused is
	// over, and drainMax how long nftrace waits for that at the most.
	quiet    = 4 * tick
	drainMax = 2 * time.Second
	// moduleTick is how often nftrace looks for modules that it waits for.
	moduleTick = 200 * time.Millisecond
)

func pid() int { return os.Getpid() }

// run is nftrace, but for the process around it: it ends when ctx is done, and leaves undone what takes time
// when now is. It returns the exit status.
func run(ctx, now context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	say := &speaker{w: stderr}
	c, err := parseFlags(args, stdout)
	var usage usageError
	switch {
	case errors.Is(err, errDone):
		return 0
	case errors.As(err, &usage):
		say.fail(fmt.Errorf("%w (nftrace --help explains)", err))
		return 2
	case err != nil:
		say.fail(err)
		return 1
	}
	say.quiet, say.verbose = c.quiet, c.verbose
	if err := traceAll(ctx, now, c, say, stdin, stdout, stderr); err != nil {
		var ve *trace.VerifierError
		if errors.As(err, &ve) && c.verbose {
			fmt.Fprintln(stderr, ve.Log())
		}
		if !errors.Is(err, errSaid) {
			say.fail(err)
		}
		return 1
	}
	return 0
}

// session is one run of the tracer.
type session struct {
	c      *config
	say    *speaker
	tracer *trace.Tracer
	ring   records // the tracer's
	asm    *events.Assembler
	tables *rulesets
	nft    *nftRulesets
	eb     *ebtRulesets
	res    *resolver
	out    *output
	links  []namedLink // see watchLinks

	printed  uint64
	dropped  dropped
	full     bool   // --count packets were printed
	untraced string // see sayUntraced
	probes   string // see sayProbes
	nextHops bool   // see sayNextHops
}

// records is where records come from: see trace.Tracer.
type records interface {
	Read(deadline time.Time) ([]byte, error)
	Written() uint64
	Taken() uint64
	Live() (uint64, error)
	Stop() error
}

// errSaid is returned where the error was told already.
var errSaid = errors.New("failed")

// errReaderGone is no failure: whoever read the output has seen enough.
var errReaderGone = errors.New("the reader of the output went away")

func traceAll(ctx, now context.Context, c *config, say *speaker, stdin io.Reader, stdout, stderr io.Writer) (err error) {
	if err := trace.CheckKernel(); err != nil {
		return err
	}
	sys, err := symbolize.NewSystem()
	if err != nil {
		return err
	}
	opts := trace.Options{MaxRules: maxRules(sys), Backend: c.backend}
	if c.expr != nil {
		opts.Filter = c.expr.Instructions()
	}
	at, err := places(ctx, sys, c)
	if err != nil {
		return err
	}
	opts.Netns, opts.Ifaces, opts.Addrs = at.netns, at.ifaces, at.addrs
	if len(c.command) > 0 {
		if _, err := exec.LookPath(c.command[0]); err != nil {
			return whyNoCommand(c.command[0], err)
		}
	}
	if c.readyFile != "" {
		if err := clearReadyFile(c.readyFile); err != nil {
			return fmt.Errorf("--ready-file %w", err)
		}
	}
	out, err := openOutput(c, stdout)
	if err != nil {
		return err
	}
	out.now = now.Done()
	if out.nowhere {
		say.say("standard output is closed, or /dev/null: no packet is written; redirect it (> FILE), or give -o FILE")
	}
	start := time.Now()
	tracer, err := trace.Open(opts)
	if err != nil {
		out.abandon()
		return err
	}
	defer func() {
		if cerr := tracer.Close(); err == nil && cerr != nil {
			err = fmt.Errorf("detach: %w", cerr)
		}
	}()
	sys.BuiltIn = tracer.BuiltIn
	out.Renderer = newRenderer(c.format, out.file == nil && isTerminal(stdout), tracer.LogsAE())
	if err := out.begin(); err != nil {
		out.abandon()
		return err
	}
	s := &session{
		c: c, say: say, tracer: tracer, ring: tracer, out: out, links: at.links,
		asm:    events.NewAssembler(),
		tables: newRulesets(sys, tracer, say),
		nft:    newNFTRulesets(sys, tracer, say),
	}
	s.eb = newEBTRulesets(s.tables)
	s.res = newResolver(sys, s.tables, s.nft, s.eb, c.format != "trace")
	s.asm.OnRun, s.asm.PortName = s.run, newPorts(sys).name
	defer s.nft.close()
	defer s.watchTables(ctx)()
	s.prefetch()
	say.detail("attached in %v", time.Since(start).Round(time.Millisecond))
	s.sayUntraced()
	s.sayNextHops()
	s.sayProbes()
	s.sayWaiting()
	if c.readyFile != "" {
		if err := os.WriteFile(c.readyFile, nil, 0o644); err != nil {
			return errors.Join(fmt.Errorf("--ready-file %w", whyNoFile(c.readyFile, err)), out.close())
		}
	}
	debug.SetGCPercent(gcTracing)
	err = s.loop(ctx, stdin, stderr)
	if errors.Is(err, errReaderGone) {
		say.say("%v; stopping", err)
		err = nil
	}
	if cerr := out.close(); err == nil && cerr != nil && !errors.Is(cerr, unix.EPIPE) {
		err = cerr
	}
	if errors.Is(err, errNow) {
		err = s.drop()
	}
	losses, lerr := tracer.Losses()
	if err == nil {
		err = lerr
	}
	// The summary is the last line, whatever happened.
	if err != nil {
		say.fail(err)
		err = errSaid
	}
	say.say("%s", summary(s.printed-out.unwritten, s.asm.Stats(), losses, s.dropped, s.res.unresolved))
	return err
}

// clearReadyFile finds out whether the file can be made, before the probes are loaded, which takes a
// while; one that an earlier run left would say now that they are.
func clearReadyFile(path string) error {
	dir := filepath.Dir(path)
	if st, err := os.Stat(dir); err != nil {
		return whyNoFile(path, err)
	} else if !st.IsDir() {
		return whyNoFile(path, unix.ENOTDIR)
	}
	if err := unix.Access(dir, unix.W_OK); err != nil {
		return whyNoFile(path, err)
	}
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return whyNoFile(path, err)
	case st.IsDir():
		return whyNoFile(path, unix.EISDIR)
	case !st.Mode().IsRegular():
		return nil
	case st.Size() > 0:
		return fmt.Errorf("%s is there already, and is no ready-file, for it holds something: name another one", path)
	}
	if err := os.Remove(path); err != nil {
		return whyNoFile(path, err)
	}
	return nil
}

// maxRules is the number of entries in all tables of a namespace and family together,
// the largest there is, with room to grow.
func maxRules(sys *symbolize.System) int {
	most := 512
	for _, ns := range sys.Namespaces() {
		for _, family := range families {
			n := 0
			for _, name := range tableNames(ns, family) {
				snap, err := symbolize.ReadSnapshot(ns, family, name, false)
				if err == nil {
					n += len(snap.Table.Entries)
				}
			}
			most = max(most, n)
		}
	}
	return 2 * most
}

// sayUntraced says what is not traced, if there is more than it said before.
func (s *session) sayUntraced() {
	if what := s.tracer.Untraced(); what != s.untraced {
		s.say.say("%s", what)
		s.untraced = what
	}
}

// sayProbes says how the kernel is probed, if it is otherwise than it said before.
func (s *session) sayProbes() {
	if what := s.tracer.Probes(); what != s.probes {
		s.say.detail("%s", what)
		s.probes = what
	}
}

func (s *session) sayWaiting() {
	waiting := map[string]bool{}
	for _, m := range s.tracer.Waiting() {
		waiting[m] = true
	}
	switch {
	case len(waiting) == 0:
	case waiting["ip_tables"] && waiting["ip6_tables"] && waiting["arp_tables"] && waiting["nf_tables"]:
		s.say.say("no rulesets on this system yet (modules ip_tables, ip6_tables, arp_tables and nf_tables are not loaded); they are traced as soon as they are there")
	default:
		s.say.detail("waiting for modules: %s", strings.Join(s.tracer.Waiting(), ", "))
	}
}

// loop reads records and prints packets until something ends it.
func (s *session) loop(ctx context.Context, stdin io.Reader, stderr io.Writer) error {
	defer watchLinks(s.links, s.say)()
	defer sayWriting(ctx, s.say)()
	var deadline <-chan time.Time
	if s.c.duration > 0 {
		t := time.NewTimer(s.c.duration)
		defer t.Stop()
		deadline = t.C
	}
	var cmd *command
	if len(s.c.command) > 0 && ctx.Err() == nil {
		var err error
		if cmd, err = startCommand(s.c.command, stdin, stderr); err != nil {
			return err
		}
		defer cmd.kill()
	}
	nextModules := time.Now().Add(moduleTick)
	for {
		if _, err := s.read(time.Now().Add(tick)); err != nil {
			return err
		}
		if s.full {
			return s.finish(0)
		}
		if s.out.gone() {
			return errReaderGone
		}
		if now := time.Now(); now.After(nextModules) {
			nextModules = now.Add(moduleTick)
			// Another namespace may have got the number of one that is no more.
			clear(s.res.names)
			if err := s.attachModules(); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return s.finish(quiet)
		case <-deadline:
			return s.finish(quiet)
		case <-cmd.done():
			if cmd.err != nil {
				s.say.say("the command ended: %v", cmd.err)
			}
			return s.drain()
		default:
		}
	}
}

func (s *session) attachModules() error {
	attached, err := s.tracer.AttachModules()
	switch len(attached) {
	case 0:
	case 1:
		s.say.say("module %s was loaded: what it does is traced from now on", attached[0])
	default:
		s.say.say("modules %s were loaded: what they do is traced from now on", strings.Join(attached, ", "))
	}
	s.sayUntraced()
	s.sayNextHops()
	s.sayProbes()
	if len(attached) > 0 {
		s.prefetch()
	}
	return err
}

// prefetch reads rulesets before a packet meets them.
func (s *session) prefetch() {
	s.tables.prefetch()
	s.eb.prefetch()
	if !slices.Contains(s.tracer.Waiting(), "nf_tables") {
		s.nft.followOwn()
	}
}

// watchTables reads tables that are replaced, beside everything else, until the function that
// it returns is called.
func (s *session) watchTables(ctx context.Context) (stop func()) {
	// Go's scheduler lets a collection of garbage have its only processor for up to 20 ms at a time,
	// and a table may be gone by then. A second one is there for the reader, whatever GOMAXPROCS says.
	if runtime.GOMAXPROCS(0) == 1 {
		runtime.GOMAXPROCS(2)
	}
	// Tables are replaced while the last packets are read, too.
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.readTables(ctx); err != nil {
			s.say.say("%v; tables that are replaced from now on may stay unresolved", err)
		}
	}()
	return func() {
		cancel()
		<-done
	}
}

// readTables reads each table that replaces another, until ctx is done.
func (s *session) readTables(ctx context.Context) error {
	for ctx.Err() == nil {
		t, err := s.tracer.ReadTable(time.Now().Add(tick))
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
		case err != nil:
			return fmt.Errorf("read the news of tables: %w", err)
		case t.ID == events.TableID{}:
			s.nft.committed(nftID{t.Netns, t.NFT})
		case t.PF == events.PFBridge:
			s.eb.replaced(t.Netns, t.Name)
		default:
			s.tables.find(t.ID, t.Netns, family(t.PF), t.Name)
		}
	}
	return nil
}

// read takes records until there are none or the time is over; empty tells which.
func (s *session) read(until time.Time) (empty bool, err error) {
	n := 0
	for !s.full {
		if n%64 == 0 && s.out.endsNow() {
			return false, errNow
		}
		raw, err := s.ring.Read(until)
		switch {
		case err == nil:
		case errors.Is(err, os.ErrDeadlineExceeded):
			if err := s.print(s.asm.Idle(monotonic())); err != nil {
				return false, err
			}
			return true, s.flush()
		default:
			return false, fmt.Errorf("read records: %w", err)
		}
		if err := s.record(raw); err != nil {
			return false, err
		}
		// The clock costs as much as a record.
		if n++; n%64 == 1 {
			if time.Now().After(until) {
				break
			}
		}
	}
	return false, s.flush()
}

// run makes sure that the table of a step is known, while it may still be there.
func (s *session) run(st *events.Step) {
	switch t := st.Table; {
	case t.NFT != nil:
		s.res.seeNFT(st)
	case t.EBT != nil:
		s.res.seeEBT(st)
	default:
		s.res.see(st)
	}
}

// record takes one record and prints the packets that are complete with it.
func (s *session) record(raw []byte) error {
	done, err := s.asm.Add(raw)
	if err != nil {
		s.say.detail("%v", err)
	}
	if len(done) == 0 {
		return nil
	}
	return s.print(done)
}

func (s *session) print(js []*events.Journey) error {
	for i, j := range js {
		if s.full {
			return nil
		}
		s.res.journey(j)
		s.printed++
		if err := s.out.journey(j); err != nil {
			if errors.Is(err, errNow) {
				s.dropped.packets += uint64(len(js) - i - 1)
			}
			return s.writeError(err)
		}
		s.full = s.c.count > 0 && s.printed == s.c.count
	}
	return nil
}

func (s *session) flush() error { return s.writeError(s.out.flush()) }

func (s *session) writeError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EPIPE):
		return errReaderGone
	case errors.Is(err, unix.ENOSPC):
		return fmt.Errorf("%w; the packets written before are kept", err)
	}
	return err
}

// drain goes on reading until what the command caused is over: no record of a packet that is wanted has come
// for a while.
func (s *session) drain() error {
	ended := monotonic()
	for now := ended; now < ended+drainMax; now = monotonic() {
		empty, err := s.read(time.Now().Add(tick))
		if err != nil || s.full {
			return err
		}
		if empty && monotonic()-max(s.asm.Newest(), ended) >= quiet {
			return s.finish(0)
		}
	}
	stop := monotonic()
	if err := s.finish(0); err != nil {
		return err
	}
	// What was read only now may be older.
	if !s.full && s.asm.Newest() > stop-quiet {
		s.say.say("packets still came %v after the command had ended: later ones are not shown", drainMax)
	}
	return nil
}

// finish begins no more journeys, gives those under way some time, and prints all. What
// is in the buffer by then is read however long it takes: it is seen, so it is not lost. But what
// comes later may never end, where a packet goes round for ever.
func (s *session) finish(wait time.Duration) error {
	if err := s.ring.Stop(); err != nil {
		return err
	}
	end := time.Now().Add(wait)
	var live uint64
	last := uint64(math.MaxUint64) // that is read, as Written has it
	for {
		// Asked before reading: the last packet's records are there when it is 0.
		var err error
		if live, err = s.ring.Live(); err != nil {
			return err
		}
		empty, err := s.read(time.Now().Add(tick))
		if err != nil {
			return err
		}
		over := time.Now().After(end)
		if s.full || empty && (live == 0 || over) || s.ring.Taken() >= last {
			break
		}
		if over {
			last = min(last, s.ring.Written())
		}
	}
	if err := s.print(s.asm.Flush(live)); err != nil {
		return err
	}
	return s.flush()
}

// dropped is what was seen and not written, for nftrace was to end at once.
type dropped struct {
	packets uint64
	records uint64 // of packets that nobody put together
}

// drop counts what is left.
func (s *session) drop() error {
	if err := s.ring.Stop(); err != nil {
		return err
	}
	for last := s.ring.Written(); s.ring.Taken() < last; {
		_, err := s.ring.Read(time.Now())
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil {
			return fmt.Errorf("read records: %w", err)
		}
		s.dropped.records++
	}
	s.dropped.packets += s.out.unwritten + uint64(len(s.asm.Flush(0)))
	return nil
}

// sayWriting says that nftrace has not ended yet, where it takes long after it was asked to, until the function
// that it returns is called.
func sayWriting(ctx context.Context, say *speaker) (stop func()) {
	ended, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		select {
		case <-ended:
			return
		case <-ctx.Done():
		}
		select {
		case <-ended:
		case <-time.After(again):
			say.say("still writing the packets that were seen, as fast as they are read; interrupt again to end at once and lose them")
		}
	}()
	return func() {
		close(ended)
		<-done
	}
}

// monotonic is the time since boot on the clock of bpf_ktime_get_ns.
func monotonic() time.Duration {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}
