// What `deltakit inspect --html` shows of a delta.

add(cards([{ label: "Entries", value: format.count(data.report.entries) }]));
