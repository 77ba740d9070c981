package render

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/nftrace/nftrace/pkg/events"
)

// Nothing is said of a verdict that is not known.
func TestVerdictUnknown(t *testing.T) {
	at := events.Step{Place: &events.Place{PF: events.PFIPv4, Hook: events.HookForward}, Verdict: events.VerdictUnknown}
	table, hook := at, at
	table.Kind, table.Table = events.StepTable, &events.TableRun{Name: "filter", Before: &events.Packet{}, Unresolved: "torn"}
	hook.Kind = events.StepHook
	for _, tt := range []struct {
		name      string
		hook      int
		has, hasn string
	}{
		{"gone", events.VerdictUnknown, "filter: rules unresolved: torn\n", "hook →"},
		{"dropped", events.NFDrop, "hook → DROP  a table above, or conntrack", "none of the tables"},
	} {
		hook.Verdict = tt.hook
		j := &events.Journey{First: events.Packet{VLAN: -1}, Steps: []events.Step{table, hook},
			Outcome: events.Outcome{Kind: events.OutFreed, Step: -1, Rule: -1}}
		var b bytes.Buffer
		if err := Tree(&b, j, TreeOptions{}); err != nil {
			t.Fatal(err)
		}
		if got := b.String(); !strings.Contains(got, tt.has) || strings.Contains(got, tt.hasn) || strings.Contains(got, "returned") {
			t.Errorf("%s: %s", tt.name, got)
		}
		b.Reset()
		if err := JSON(&b, j); err != nil {
			t.Fatal(err)
		}
		var o Object
		if err := json.Unmarshal(b.Bytes(), &o); err != nil {
			t.Fatal(err)
		}
		if v := o.Steps[0].Verdict; v != "" {
			t.Errorf("%s: JSON has the verdict %q", tt.name, v)
		}
	}
}

// What table broute returns is no verdict on the packet.
func TestVerdictOfBroute(t *testing.T) {
	for verdict, want := range map[int]string{events.NFDrop: "(the table returned DROP: route it)", events.NFAccept: "(the table returned ACCEPT)"} {
		j := &events.Journey{First: events.Packet{VLAN: -1}, Steps: []events.Step{{
			Place: &events.Place{PF: events.PFBridge}, Kind: events.StepTable, Verdict: events.NFAccept,
			Table: &events.TableRun{Name: "broute", Before: &events.Packet{}, Unresolved: "torn", EBT: &events.EBTRun{Hook: events.HookBrouting, Verdict: verdict}},
		}}, Outcome: events.Outcome{Kind: events.OutFreed, Step: -1, Rule: -1}}
		var b bytes.Buffer
		if err := Tree(&b, j, TreeOptions{}); err != nil {
			t.Fatal(err)
		}
		if got := b.String(); !strings.Contains(got, "eb:broute: rules unresolved: torn "+want+"\n") {
			t.Errorf("want %q:\n%s", want, got)
		}
	}
}

// A hook without tables at which the packet was seen last.
func TestHookUnknown(t *testing.T) {
	j := &events.Journey{First: events.Packet{VLAN: -1}, Steps: []events.Step{
		{Place: &events.Place{PF: events.PFIPv4}, Kind: events.StepHook, Verdict: events.VerdictUnknown},
	}, Outcome: events.Outcome{Kind: events.OutFreed, Step: -1, Rule: -1}}
	var b bytes.Buffer
	if err := Tree(&b, j, TreeOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := b.String(); strings.Contains(got, "hook →") {
		t.Error(got)
	}
}

// A packet that is not known has no mark that could have changed.
func TestPacketUnknown(t *testing.T) {
	j := &events.Journey{First: events.Packet{VLAN: -1, Mark: 7, Data: []byte{}}, Steps: []events.Step{{
		Place: &events.Place{PF: events.PFIPv4}, Kind: events.StepTable, Verdict: events.NFAccept,
		Table: &events.TableRun{Name: "filter", Before: &events.Packet{}},
	}}, Outcome: events.Outcome{Step: -1, Rule: -1}}
	var b bytes.Buffer
	if err := Tree(&b, j, TreeOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := b.String(); strings.Contains(got, "→ 0x0") {
		t.Error(got)
	}
}
